"""What tells whether training helps: the task's own where batches have what it needs, else the divergence from a teacher."""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import DataError
from ..tasks import left_alone
from ..tasks.batches import Batch
from ..tasks.divergence import Yardstick
from ..tasks.losses import IGNORED, loss_of, targets_of


class HeldOut:
    """Measures any state of one model on the same batches. Raises DataError where there is neither a loss nor a teacher."""

    def __init__(self, batches: Sequence[Batch], teacher: nn.Module | None = None) -> None:
        self.batches, self.teacher = batches, teacher
        self._yardstick: Yardstick | None = None

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean over predictions in nats; mode and random streams of the model stay."""
        with left_alone([model]):
            if self._yardstick is None:
                try:
                    return self._task(model)
                except DataError:
                    if self.teacher is None:
                        raise
                    with left_alone([self.teacher]):
                        self._yardstick = Yardstick(self.teacher, self.batches)
            return self._yardstick.divergence(model)

    def _task(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        for batch in self.batches:
            targets = targets_of(model, batch)
            rows = 1 if targets is None else int((targets != IGNORED).sum())
            total, count = total + rows * float(loss_of(model, batch)), count + rows
        return total / max(1, count)
