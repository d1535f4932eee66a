"""What a command trains on, and the rest that it is judged by: never the same windows."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import DataError
from .inputs import DataChoice, ModelChoice
from .screen import Screen

if TYPE_CHECKING:
    from ..tasks import Batches

SPLIT = ("python-docs", "digits")  # sources that keep a part for judging themselves
SHARE, MOST = 16, 64  # of other sources: one window in so many is held out, at most so many
JUDGED = 16_384  # tokens of a source that keeps a part, or of a text of its own


@dataclass(frozen=True)
class TrainingData:
    """Data as asked for. `choice.samples` is the most that is trained on."""

    choice: DataChoice
    held_out: str | None

    def read(self, model: ModelChoice, screen: Screen) -> "tuple[Batches, Batches]":
        """Batches to train on, and held-out ones. Raises DataError, ConfigError."""
        source = self.choice.where(model)
        batch = self.choice.batch or (32 if model.sees else 4)
        one = replace(self.choice, batch=1)
        judged = self._judged(source, one, model, screen)
        rows = _drawn(one, model, screen) if source in SPLIT else one.read(model, screen)
        most = self.choice.samples or len(rows)
        train, rest = _parted(rows, self.choice.seed, most, 0 if judged is not None else None)
        return _grouped(train, batch), _grouped(rest if judged is None else judged, batch)

    def _judged(self, source: str, one: DataChoice, model: ModelChoice, screen: Screen) -> "Batches | None":
        """What is held out where that is not a part of the same windows."""
        if self.held_out is not None:
            return replace(one, source=self.held_out).read(model, screen, None if model.sees else JUDGED)
        return one.read(model, screen, None if model.sees else JUDGED) if source in SPLIT else None


def _drawn(one: DataChoice, model: ModelChoice, screen: Screen) -> "Batches":
    """As many windows of a library of text as asked for, or about as it holds; of images all."""
    samples = None if model.sees else one.samples
    while True:
        try:
            return replace(one, samples=samples).draw(model, screen)
        except DataError:
            if samples is None or samples < 2:
                raise
            samples //= 2


def _parted(rows: "Batches", seed: int, most: int, held: int | None) -> "tuple[Batches, Batches]":
    """In a random order: what is trained on, at most `most`, and `held` rows (None: a share) that are not."""
    import torch

    from ..randomness import generator_for
    from ..tasks import Batches

    if held is None:
        held = min(MOST, len(rows) // SHARE)
        if not held:
            raise DataError(
                f"{rows.protocol.get('source')}: {len(rows)} windows are too few to hold some out. Give --held-out FILE, a smaller"
                " --length, or more data."
            )
    order = torch.randperm(len(rows), generator=generator_for(seed, "training/held out")).tolist()
    train = order[held : held + most]
    facts = {**rows.protocol, "seed": seed}
    return (
        Batches(tuple(rows[index] for index in train), {**facts, "samples": len(train)}),
        Batches(
            tuple(rows[index] for index in sorted(order[:held])), {**facts, "samples": held, "split": "not trained on"}
        ),
    )


def _grouped(rows: "Batches", batch: int) -> "Batches":
    """Samples of one shape side by side, in their order."""
    import torch

    from ..tasks import Batches

    groups: list[list[int]] = []
    shapes: list[dict[str, object]] = []
    for index, row in enumerate(rows):
        shape: dict[str, object] = {name: value.shape[1:] for name, value in row.items()}
        if not groups or len(groups[-1]) == batch or shapes[-1] != shape:
            groups.append([])
            shapes.append(shape)
        groups[-1].append(index)
    joined = tuple({name: torch.cat([rows[i][name] for i in group]) for name in rows[group[0]]} for group in groups)
    return Batches(joined, {**rows.protocol, "batch": batch})
