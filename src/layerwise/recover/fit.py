"""A plain training loop: an optimiser, a loss, masks that hold. Short on purpose; the stock Trainer takes the same masks (`trainer.py`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..errors import ConfigError, DataError, TrainError
from ..randomness import generator_for
from ..tasks.batches import Batch
from ..tasks.losses import Loss, loss_of
from ..tasks.undisturbed import go_back_to, random_streams
from .masks import hold

Augment = Callable[[Batch, torch.Generator], Batch]
"""A batch as it is shown this time; draws from the generator alone."""
Progress = Callable[[int, int], None]


def fine_tune(
    model: nn.Module,
    data: Sequence[Batch],
    optimizer: Optimizer,
    *,
    epochs: int = 1,
    keep: Mapping[str, Tensor] | None = None,
    loss: Loss = loss_of,
    schedule: LRScheduler | None = None,
    augment: Augment | None = None,
    clip: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place; returns the mean loss of each epoch.

    keep: masks to hold (`masks_of`, a method's `keep`); None: none. schedule: stepped after every batch. clip: largest norm of all
    gradients, above 0. Batches come in an order drawn anew each epoch. seed: of that order, of `augment`, and of what the model draws
    (dropout): global random streams and the mode of the model are what they were afterwards. progress: (steps done, steps).
    Raises TrainError for a loss that is not finite, ConfigError for bad settings and float16 weights, which lose small steps,
    DataError without batches.
    """
    if not len(data):
        raise DataError("fine_tune needs at least one batch.")
    if epochs < 1:
        raise ConfigError(f"fine_tune: epochs={epochs}: give at least 1.")
    if clip is not None and not 0 < clip < math.inf:
        raise ConfigError(f"fine_tune: clip={clip:g}: give a finite norm above 0, or None.")
    if any(one.dtype == torch.float16 for one in model.parameters()):
        raise ConfigError("fine_tune: float16 weights lose small steps. Load the model in float32 or bfloat16.")
    modes, streams = [(module, module.training) for module in model.modules()], random_streams()
    draw, means, steps = generator_for(seed, "fine_tune"), list[float](), epochs * len(data)
    try:
        torch.manual_seed(int(torch.randint(2**31, (), generator=draw)))
        model.train()
        with hold(model, keep, optimizer) if keep else nullcontext():
            for epoch in range(epochs):
                total = 0.0
                for place, index in enumerate(torch.randperm(len(data), generator=draw).tolist()):
                    batch = data[index] if augment is None else augment(data[index], draw)
                    value = _step(model, batch, optimizer, loss, clip)
                    if not math.isfinite(value):
                        raise TrainError(
                            f"epoch {epoch + 1}, batch {index}: the loss is {value}. Lower the learning rate, or clip gradients."
                        )
                    if schedule is not None:
                        schedule.step()
                    total += value
                    if progress is not None:
                        progress(epoch * len(data) + place + 1, steps)
                means.append(total / len(data))
    finally:
        for module, mode in modes:
            module.training = mode
        go_back_to(streams)
    return means


def _step(model: nn.Module, batch: Batch, optimizer: Optimizer, loss: Loss, clip: float | None) -> float:
    """One step; none where the loss is not finite."""
    optimizer.zero_grad(set_to_none=True)
    with torch.enable_grad():
        value = loss(model, batch)
        if not (found := float(value.detach())) < math.inf:
            return found
        value.backward()  # type: ignore[no-untyped-call]
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return found


def warm_cosine(optimizer: Optimizer, steps: int, *, warm: float = 0.05, floor: float = 0.01) -> LRScheduler:
    """Learning rates that rise over the first `warm` of `steps`, then fall as a cosine to `floor` times their value; for `schedule`."""
    if steps < 1 or not 0 <= warm < 1 or not 0 <= floor <= 1:
        raise ConfigError(f"warm_cosine: steps={steps}, warm={warm:g}, floor={floor:g}: give steps >= 1 and fractions.")
    first = round(warm * steps)

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / (first + 1)
        part = min(1.0, (step - first) / max(1, steps - first))
        return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2

    return LambdaLR(optimizer, factor)
