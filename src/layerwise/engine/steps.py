"""What the walk does at one unit: collect, solve, tune where somebody asks for it, and compute what each pass goes on with."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..passes import Collector, Pass, SharedInput, at_hand, store_of
from ..passes.paused import tensors_of
from ..plan import Treatments
from ..solvers.base import Solver
from ..structure import Layer
from .events import BlockFinished, BlockStarted, BlockTuned, Event, LayerSolved
from .ranks import Ranks
from .settings import Settings
from .solving import solve_groups
from .tuning import SolvedBlock, Tuner, streams_of
from .work import Work


@dataclass(frozen=True)
class Unit:
    """What the walk stops at: a block, or a module outside every block that owns a layer."""

    name: str
    layers: tuple[Layer, ...]  # those that the plan treats
    block: bool = True


@dataclass
class _Course:
    """One unit under way."""

    unit: Unit
    standing: list[Pass]  # those that see the compressed model
    dense: list[Pass]  # those that see the untouched one
    last: bool
    resumed: bool
    seconds: dict[str, float] = field(default_factory=lambda: {"collect": 0.0, "solve": 0.0, "propagate": 0.0})
    outputs: list[object] = field(default_factory=list)  # of standing
    untouched: list[object] = field(default_factory=list)  # of dense


@dataclass
class Steps:
    """What is done at one unit. tuner: None, or who tunes solved blocks; the passes from `batches` on then see the untouched model."""

    model: nn.Module
    ways: Mapping[str, Treatments]
    solver: Solver
    settings: Settings
    ranks: Ranks
    work: Work | None
    total: int
    tuner: Tuner | None = None
    batches: int | None = None  # None: every pass sees the compressed model

    def without_data(self, unit: Unit, index: int) -> Iterator[Event]:
        """Solve a unit from its weights alone."""
        yield BlockStarted(unit.name, index, self.total)
        started = time.perf_counter()
        resumed = self._finished(unit)
        with at_hand(self.model, unit.name, self.settings.device) as module:
            if resumed:
                yield from self._resume(unit)
            else:
                yield from self._solve(unit, _alone(unit), module, None)
        yield BlockFinished(unit.name, index, self.total, {"solve": time.perf_counter() - started}, resumed)

    def with_data(
        self, unit: Unit, index: int, passes: list[Pass], *, last: bool
    ) -> Generator[Event, None, list[object]]:
        """Collect, solve, tune, and compute what each pass goes on with (nothing after the last unit). Returns the outputs."""
        yield BlockStarted(unit.name, index, self.total)
        seen = [one for one in passes if self.batches is None or one.index < self.batches]
        course = _Course(unit, seen, passes[len(seen) :], last, self._finished(unit))
        dense, device, seconds = self.settings.propagate == "dense", self.settings.device, course.seconds
        with at_hand(self.model, unit.name, device) as module:
            started = _now()
            groups = self._collect(course)
            seconds["collect"], started = _now() - started, _now()
            if course.resumed:
                yield from self._resume(unit)
            elif unit.layers:
                yield from self._solve(unit, groups, module, course)
            seconds["solve"], started = _now() - started - seconds.get("tune", 0.0), _now()
            if not last and not dense:
                course.outputs = [one.run(device, fresh=course.standing[0].wrote) for one in course.standing]
            seconds["propagate"] = _now() - started
        yield BlockFinished(unit.name, index, self.total, seconds, course.resumed)
        return [*course.outputs, *course.untouched]

    def _collect(self, course: _Course) -> list[SharedInput]:
        """What the solver needs of this unit, and what its dense form gives where that is asked for."""
        unit, device, dense = course.unit, self.settings.device, self.settings.propagate == "dense"
        tunes = self._tunes(unit) and not course.resumed
        if not course.last or tunes:
            course.untouched = [one.run(device, fresh=True) for one in course.dense]
        if not unit.layers or course.resumed:
            if dense and not course.last:  # before finished weights are read
                course.outputs = [one.run(device, fresh=True) for one in course.standing]
            return []
        keep = (dense and not course.last) or (tunes and not course.dense)
        groups = _alone(unit)
        if self.solver.needs != "none":
            with Collector(self.model, unit.layers, self.solver.needs, stop_early=not keep) as collector:
                for one in course.standing:
                    output = collector.run(one, device, fresh=one is course.standing[0] or course.standing[0].wrote)
                    if keep:
                        course.outputs.append(output)
            groups = self.ranks.agree(collector.groups())
        elif keep:
            course.outputs = [one.run(device, fresh=True) for one in course.standing]
        return groups

    def _tunes(self, unit: Unit) -> bool:
        return self.tuner is not None and unit.block and bool(unit.layers)

    def _finished(self, unit: Unit) -> bool:
        """Rank 0 looks, for all: it writes the files, and a rank that comes late would see what this run has just written."""
        if self.work is None or not unit.layers:
            return False
        return self.ranks.share_object(self.work.finished(unit.name), 0)

    def _solve(
        self, unit: Unit, groups: list[SharedInput], module: nn.Module, course: _Course | None
    ) -> Iterator[LayerSolved | BlockTuned]:
        solved: list[LayerSolved] = []
        if course is not None and self.solver.needs != "none":
            device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
            for group in groups:
                self.ranks.add_up(group.accumulators, group.layers[0].columns, self.solver.needs, device)
        tuned: BlockTuned | None = None
        tunes = course is not None and self._tunes(unit)
        for event in solve_groups(self.model, groups, self.ways, self.solver, self.settings.seed, self.ranks):
            solved.append(event)
            if not tunes:
                yield event
        if course is not None and tunes:
            started = _now()
            solved, tuned = self._tune(course, solved, module)
            course.seconds["tune"] = _now() - started
            yield from solved
            yield tuned
        if self.work and unit.layers and self.ranks.rank == 0:
            tensors = {f"{unit.name}.{name}": parameter for name, parameter in module.named_parameters()}
            self.work.write(unit.name, tensors, solved, tuned)
        self.ranks.wait()
        self._keep(unit)

    def _tune(
        self, course: _Course, solved: Sequence[LayerSolved], module: nn.Module
    ) -> tuple[list[LayerSolved], BlockTuned]:
        assert self.tuner is not None  # noqa: S101  (only then is a block tuned)
        name, outputs = course.unit.name, course.untouched if course.dense else course.outputs
        streams = streams_of(outputs[0], course.standing[0].arguments, name)
        targets = [[tensors[place] for place in streams] for tensors in map(tensors_of, outputs)]
        fresh = any(one.wrote for one in (*course.standing, *course.dense))
        known = {layer.name: layer for layer in course.unit.layers}
        layers = [known[event.layer] for event in solved]
        block = SolvedBlock(
            name, self.model, module, layers, solved, course.standing, streams, targets, self.settings.device, fresh
        )
        return self.tuner.tune(block)

    def _resume(self, unit: Unit) -> Iterator[LayerSolved | BlockTuned]:
        assert self.work is not None  # noqa: S101  (only then is a unit finished)
        yield from self.work.read_into(self.model, unit.name)
        self._keep(unit)

    def _keep(self, unit: Unit) -> None:
        """A streamed block is read from the work folder from now on."""
        if self.work and unit.layers and (store := store_of(self.model)) is not None:
            store.replace(unit.name, self.work.path(unit.name))


def _alone(unit: Unit) -> list[SharedInput]:
    """Every layer by itself, without statistics."""
    return [SharedInput([layer], [None] * layer.matrices) for layer in unit.layers]


def _now() -> float:
    """Seconds, with what was queued on an accelerator done: else its time would be booked on a later step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
