"""Adapt-Accel: pruning and training in turn, under one learning-rate schedule (Pan et al. 2025, arXiv:2502.03460).

Each stage prunes to the next target (`AdaptPruner`) and trains what is left on its slice of the data; where an earlier one went below that
target, it trains alone. Departures from the official code:
shares of heads and channels are of the sizes at the very start, in all stages (restarting them, as `method.reference` does, leaves
attention whole), and a stage is judged by held-out data and left in its best state. A run that was killed goes on from the last
checkpoint of its stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from ..errors import ConfigError, DataError
from ..plan import Plan
from ..recover import Recovered, Recovery
from ..recover.rates import slices
from ..recover.recovery import Moment
from ..shrink import apply, kept_by
from ..structure import coupled_groups
from ..tasks.batches import Batch, Batches
from .adapt_pruner import AdaptPruner, Schedule, stage_targets
from .widths import Widths, widths_plan

Progress = Callable[[int, int, Moment], None]
"""Stage, stages, and how far the training of this one is."""


@dataclass(frozen=True)
class Stage:
    """What one stage did: parameters that are left, and the held-out losses before and after its training."""

    parameters: int
    before: float
    after: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Accelerated:
    """What became of the stages, and the plan of the units that are left of the dense model's."""

    stages: tuple[Stage, ...]
    plan: Plan


def adapt_accel(
    model: nn.Module,
    method: AdaptPruner,
    calibration: Batches,
    data: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    recovery: Recovery,
    stages: int,
    work: str | Path,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
) -> Accelerated:
    """Prune and train in place, `stages` times, down to `method.parameters`.

    calibration: what pruning looks at. data: what is trained on, cut into slices that grow. recovery: minutes or steps of all stages
    together, and how they train; its schedule is "wsd" over the whole. Raises ConfigError for fewer than one stage, DataError for less
    data than stages, and what pruning and training raise.
    """
    if method.budget != "parameters":
        raise ConfigError(f'adapt_accel: budget="{method.budget}": stages are cut by parameters.')
    if stages < 1:
        raise ConfigError(f"adapt_accel: stages={stages}: give at least 1.")
    sizes = slices(len(data), stages)
    if not all(sizes):
        raise DataError(
            f"adapt_accel: {len(data)} batches cannot be cut into {stages} slices that grow. Give more data, or fewer stages."
        )
    widths = Widths(
        "AdaptPruner", model, None, method.parameters,
        min_heads=method.min_heads, min_channels=method.min_channels, multiple_of=method.multiple_of,
    )  # fmt: skip
    widths.leave_unreached(model, calibration)
    kept = {group.name: [*range(group.units)] for group in widths.groups}
    schedule, first, done, scores = Schedule.of(model), 0, list[Stage](), dict[str, float]()
    for stage, (parameters, size) in enumerate(
        zip(stage_targets(widths.total, widths.target, stages), sizes, strict=True)
    ):
        if _parameters(model) > parameters:  # else an earlier stage went below this target, too
            goes_on = None if method.reference else schedule  # the code starts anew in every stage
            plan = replace(method, parameters=parameters).plan(model, calibration, schedule=goes_on)
            left = kept_by(model, plan, coupled_groups(model))
            kept = {name: [units[place] for place in left.get(name, range(len(units)))] for name, units in kept.items()}
            apply(model, plan)
            scores = dict(plan.scores)
        begin, end = first / len(data), (first + size) / len(data)
        found = _part(recovery, begin, end).train(
            model,
            data[first : first + size],
            held_out,
            work=Path(work) / f"stage-{stage + 1}",
            teacher=teacher,
            progress=None if progress is None else partial(progress, stage, stages),
        )
        first += size
        done.append(_stage(model, found))
    note = f"Cut in {stages} stages, with training after each."
    return Accelerated(tuple(done), widths_plan(method, widths, kept, scores, [note]))


def _part(recovery: Recovery, begin: float, end: float) -> Recovery:
    """The training of one stage: its share of the time, at its place in the schedule. Nothing ends it early: the schedule goes on."""
    share = end - begin
    return replace(
        recovery,
        minutes=None if recovery.minutes is None else recovery.minutes * share,
        steps=None if recovery.steps is None else max(1, round(recovery.steps * share)),
        schedule="wsd",
        begin=begin,
        end=end,
        looks=max(2, round(recovery.looks * share)),
        patience=recovery.looks,
    )


def _stage(model: nn.Module, found: Recovered) -> Stage:
    return Stage(_parameters(model), found.before, found.after, found.steps, found.seconds)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
