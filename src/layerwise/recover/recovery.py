"""Win back what compression cost: train on the stock Trainer with masks held, against a teacher, and keep the best state.

    from layerwise.recover import Recovery
    result = Recovery(minutes=10).train(model, data, held_out, teacher=dense, work="work")

The held-out loss is measured before, at even steps of the time or the steps, and at the end; the model is left in the state where it was
lowest, which may be the one it came in. Every measurement writes a checkpoint of the stock Trainer into the work folder, and a run that
was killed goes on from the last whole one: with `steps`, to the same bits.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.lock import FileLock
from ..errors import ConfigError, DataError, ModelError, OutputError
from ..files import whole_file
from ..tasks.batches import Batch, Batches
from ..tasks.undisturbed import random_states
from .distill import Distillation
from .held_out import HeldOut
from .masks import Masks
from .quantized import refuse_quantized
from .rates import SCHEDULES

RUN = "recovery.json"  # in the work folder: which run it belongs to; in each checkpoint: how far it was
Progress = Callable[["Moment"], None]


@dataclass(frozen=True)
class Moment:
    """How far a run is. share: of the steps or the minutes, 0 to 1. loss: of the last step. held_out: the last one measured."""

    step: int
    share: float
    loss: float
    held_out: float


@dataclass(frozen=True)
class Recovered:
    """What a run did. Losses are held-out ones, in nats; `history` has (step, seconds of training, mean training loss since the entry
    before, held-out loss), the first before any step. The model is in the state of `best`, a step."""

    before: float
    after: float
    best: int
    steps: int
    seconds: float
    why: str
    history: tuple[tuple[int, float, float | None, float], ...]
    resumed: int = 0
    leaked: int = field(default=0, repr=False)  # pruned weights that are not zero: none, or something is wrong

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Recovery:
    """How to train. Give minutes or steps, or both: what ends first ends the run.

    AdamW on every weight that takes gradients, warm-up, then a cosine down to a tenth. Weights should be float32 (a bfloat16 weight
    loses steps that are small beside it); mixed precision is `precision`.
    """

    minutes: float | None = None
    steps: int | None = None
    lr: float = 1e-4
    warm: float = 0.05  # share of the run
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1  # batches to one step
    alpha: float = 0.5  # the teacher's share of the loss, where there is one
    temperature: float = 1.0
    beta: float = 0.0
    hidden: float = 0.0
    schedule: str = "cosine"  # or wsd: warm-up, constant, down over the last tenth
    begin: float = 0.0  # where in the schedule of a longer run this one begins and ends
    end: float = 1.0
    looks: int = 10  # times that the held-out loss is measured after the first
    patience: int = 3  # looks without a lower held-out loss that end the run
    precision: str = "float32"  # or bfloat16: autocast
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ConfigError("Recovery: give minutes or steps.")
        bad = {
            "minutes": self.minutes is not None and not 0 < self.minutes < math.inf,
            "steps": self.steps is not None and self.steps < 1,
            "lr": not 0 < self.lr < math.inf,
            "warm": not 0 <= self.warm < 1,
            "weight_decay": not 0 <= self.weight_decay < math.inf,
            "clip": not 0 < self.clip < math.inf,
            "accumulate": self.accumulate < 1,
            "begin": not 0 <= self.begin < self.end,
            "end": not self.begin < self.end <= 1,
            "looks": self.looks < 1,
            "patience": self.patience < 1,
        }
        if name := next((name for name, wrong in bad.items() if wrong), None):
            part = "shares of a longer run, 0 <= begin < end <= 1"
            right = {
                "warm": "a share of the run, 0 <= warm < 1",
                "weight_decay": "at least 0",
                "begin": part,
                "end": part,
            }.get(name, "above 0")
            raise ConfigError(f"Recovery: {name}={getattr(self, name)!r}: give {right}.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f'Recovery: schedule="{self.schedule}": write {" or ".join(SCHEDULES)}.')
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f'Recovery: precision="{self.precision}": write float32 or bfloat16.')
        self.loss_against(nn.Identity())  # its settings are checked there

    def loss_against(self, teacher: nn.Module, **more: Any) -> Distillation:
        """The loss of a student against this teacher."""
        return Distillation(
            teacher, alpha=self.alpha, temperature=self.temperature, beta=self.beta, hidden=self.hidden, **more
        )

    def train(
        self,
        model: nn.Module,
        data: Sequence[Batch],
        held_out: Sequence[Batch],
        *,
        work: str | Path,
        teacher: nn.Module | None = None,
        keep: Mapping[str, Tensor] | None = None,
        vocabulary: int | None = None,
        blocks: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Recovered:
        """Train in place. Batches are those of a step (see `accumulate`), shown in an order drawn anew each epoch.

        keep: masks to hold (`masks_of`); None: none. vocabulary, blocks: of `Distillation`. work: a folder of this run; one of other
        settings, data or weights is refused. facts: more that makes runs differ, plain values. The mode, the device and global random
        streams are what they were afterwards.
        Raises ConfigError (settings, another run's folder, nothing to train, float16), DataError (no batches), ModelError (a teacher of
        another vocabulary, quantized weights that take gradients), MissingExtra without accelerate, TrainError where a loss is not
        finite: the model is then in its best state.
        """
        from .stock import Stock, require_accelerate

        require_accelerate()
        _check(model, data, held_out)
        refuse_quantized(model)
        if self.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
            raise ConfigError(f"gradient_checkpointing: {type(model).__name__} does not know it. Leave it out.")
        measured = HeldOut(held_out, teacher)
        loss = None if teacher is None else self.loss_against(teacher, vocabulary=vocabulary, blocks=blocks)
        folder = Path(work)
        modes, devices = [(one, one.training) for one in model.modules()], _device_of(model)
        with ExitStack() as stack:
            stack.enter_context(_locked(folder))
            stack.enter_context(random_states())
            known = {**self._facts(model, data, held_out, teacher, keep), **(facts or {})}
            masks = Masks(model, keep) if keep else None
            try:
                _begin(folder, known)
                return Stock(self, model, data, measured, loss, masks, folder, progress).run()
            finally:
                if masks is not None:
                    masks.release()
                for module, mode in modes:
                    module.training = mode
                if self.gradient_checkpointing:
                    model.gradient_checkpointing_disable()  # type: ignore[operator]
                model.to(devices)

    def _facts(
        self,
        model: nn.Module,
        data: Sequence[Batch],
        held_out: Sequence[Batch],
        teacher: nn.Module | None,
        keep: Mapping[str, Tensor] | None,
    ) -> dict[str, Any]:
        """What makes two runs the same."""
        return {
            **asdict(self),
            "model": _digest(model),
            "teacher": None if teacher is None else _digest(teacher),
            "data": Batches(tuple(data), {}).hash,
            "held-out data": Batches(tuple(held_out), {}).hash,
            "masks": None if keep is None else sum(int(mask.sum()) for mask in keep.values()),
            "torch": torch.__version__,
        }


def _check(model: nn.Module, data: Sequence[Batch], held_out: Sequence[Batch]) -> None:
    if not len(data) or not len(held_out):
        raise DataError("recovery needs at least one batch to train on and one to judge by.")
    trained = [one for one in model.parameters() if one.requires_grad]
    if not trained:
        raise ConfigError(f"{type(model).__name__} has no trainable parameters: all are frozen.")
    if any(one.dtype == torch.float16 for one in trained):
        raise ConfigError("float16 weights lose small steps. Load the model in float32 or bfloat16.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "recovery runs in one process. For several, train in a script of your own: Masks(...).callback() and LossTrainer work there."
        )
    if any(one.device.type == "meta" for one in trained):
        raise ModelError("the model is streamed: its weights are not in memory. Load it without streaming.")


def _digest(model: nn.Module) -> str:
    """Names, shapes and a sample of the values of every weight: enough to tell models apart, and quick."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.requires_grad}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class _locked:  # noqa: N801  (read as a word in a with statement)
    """The work folder, ours alone. Raises OutputError, ConfigError."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, FileLock(folder / "lock")

    def __enter__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            ours = self.lock.take()
        except OSError as error:
            raise OutputError(f'work folder "{self.folder}" cannot be made or locked: {error.strerror}.') from error
        if not ours:
            raise ConfigError(
                f'work folder "{self.folder}": another run is using it. Wait for that to end, or give another (--work).'
            )

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """The folder is of this run, or ConfigError with the difference."""
    file, now = folder / RUN, json.loads(json.dumps(dict(facts), default=str))
    if not file.exists():
        with whole_file(file) as partial:
            partial.write_text(json.dumps(now, indent=1), encoding="utf-8")
        return
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{file}: not readable; remove the work folder to start again.") from error
    if changed := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        details = "; ".join(f"{name}: {before.get(name)} then, {now.get(name)} now" for name in changed)
        raise ConfigError(f"{folder}: belongs to another run ({details}). Use another folder, or remove it.")


def clear(work: str | Path) -> None:
    """Remove what a run left in its work folder, and the folder if nothing else is in it."""
    folder = Path(work)
    for entry in (*folder.glob("checkpoint-*"), *folder.glob("best-*"), *folder.glob(RUN)):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:  # something is in it, or it is not there
        return
