"""Training of what is left after heads, channels or blocks were cut, as a part of `layerwise compress`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import DataChoice, ModelChoice
from .running import Stopped
from .screen import Screen
from .training_data import TrainingData

if TYPE_CHECKING:
    from torch import nn

    from ..methods.adapt_accel import Accelerated
    from ..recover import Recovered, Recovery
    from ..recover.recovery import Moment
    from ..tasks import Batches

SAMPLES = 2048  # windows to train on, at most
LR = 3e-4


@dataclass(frozen=True)
class Training:
    """Data, how long, and the work folder, which outlives a kill."""

    data: "Batches"
    held_out: "Batches"
    settings: "Recovery"
    work: Path

    @classmethod
    def read(
        cls,
        choice: ModelChoice,
        source: str | None,
        length: int | None,
        minutes: float,
        seed: int,
        work: Path,
        screen: Screen,
    ) -> "Training":
        """Raises what reading data raises, ConfigError for minutes that are none."""
        from ..recover import Recovery

        settings = Recovery(minutes=minutes, lr=LR, seed=seed)
        asked = DataChoice(
            source, SAMPLES, None if choice.sees else length or min(512, choice.length(None)), None, seed
        )
        data, held_out = TrainingData(asked, None).read(choice, screen)
        return cls(data, held_out, settings, work)

    def after(self, model: "nn.Module", dense: ModelChoice, screen: Screen) -> "Recovered":
        """Train a model that was cut, beside the dense one."""
        teacher = dense.load(screen).to(next(model.parameters()).device)
        model.float()
        with screen.task("Recovering") as step:
            found: Recovered = self._kept(
                lambda: self.settings.train(
                    model, self.data, self.held_out, teacher=teacher, work=self.work,
                    progress=lambda moment: step(round(1000 * moment.share), 1000, _words(moment)),
                )
            )  # fmt: skip
            return found

    def in_turn(
        self,
        model: "nn.Module",
        dense: ModelChoice,
        method: Any,
        calibration: "Batches | None",
        stages: int,
        screen: Screen,
    ) -> "Accelerated":
        """Cut and train in stages."""
        from ..methods.adapt_accel import adapt_accel
        from ..methods.base import needed

        teacher = dense.load(screen).to(next(model.parameters()).device)
        model.float()
        with screen.task(f"Cutting and training in {stages} stages") as step:

            def moved(stage: int, of: int, moment: "Moment") -> None:
                step(round(1000 * (stage + moment.share)), 1000 * of, f"stage {stage + 1}, {_words(moment)}")

            done: Accelerated = self._kept(
                lambda: adapt_accel(
                    model, method, needed("adapt-pruner", calibration), self.data, self.held_out, recovery=self.settings,
                    stages=stages, work=self.work, teacher=teacher, progress=moved,
                )
            )  # fmt: skip
            return done

    def _kept(self, run: Any) -> Any:
        try:
            return run()
        except KeyboardInterrupt as error:
            raise Stopped(f"stopped. Run the same command again to go on from {self.work}.") from error

    def clear(self) -> None:
        """Remove what training left in the work folder."""
        from ..recover.recovery import clear

        for folder in (*self.work.glob("stage-*"), self.work):
            clear(folder)


def _words(moment: "Moment") -> str:
    return f"step {moment.step}, loss {moment.loss:.3f}, held-out {moment.held_out:.3f}"
