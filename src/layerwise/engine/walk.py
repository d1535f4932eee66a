"""The walk: every block in running order gets statistics, new weights, and hands its own output on.

By default a block is measured on inputs that the compressed blocks before it produce (`propagate="compressed"`): each block runs twice,
once for statistics (up to the input of its last layer) and once with the new weights. `propagate="dense"` measures the untouched model in
one single pass instead: a run less per block, and statistics that do not know what went wrong before.
"""

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from ..errors import ConfigError, DataError, PlanError, WalkError
from ..passes import Collector, Forward, Pass, PausedPasses, SharedInput, at_hand, spilling, store_of, waiting_of
from ..plan import Plan, Treatments
from ..solvers.base import Solver, refusal
from ..structure import Layer, Structure, factorable, structure_of
from ..tasks.batches import Batch, Batches, call
from ..version import __version__
from .events import BlockFinished, BlockStarted, Event, LayerSolved, PassesWaiting
from .ranks import Ranks
from .solving import solve_groups
from .work import Work

Propagate = Literal["compressed", "dense"]


@dataclass(frozen=True)
class Settings:
    """How the walk is done; what is done is in the plan and the solver.

    device: where each block is for its turn; None: where the model is. work: a folder that finished blocks are written to, and from
    which a killed run goes on; a `Work` that is entered already stays the caller's. seed: of solvers that draw. alone: do all of it in
    this process, also under torchrun. spill: a folder for files in which calibration batches keep their activations while they wait
    (the model must be on the CPU; its blocks may go to a device); None: in memory. The result is the same to the bit.
    """

    propagate: Propagate = "compressed"
    device: torch.device | None = None
    work: str | Work | None = None
    seed: int = 0
    alone: bool = False
    spill: str | None = None

    def __post_init__(self) -> None:
        if self.propagate not in ("compressed", "dense"):
            raise ConfigError(f'propagate="{self.propagate}": give "compressed" or "dense".')


@dataclass(frozen=True)
class Unit:
    """What the walk stops at: a block, or a module outside every block that owns a layer."""

    name: str
    layers: tuple[Layer, ...]  # those that the plan treats


def walk(
    model: nn.Module,
    plan: Plan,
    solver: Solver,
    data: Batches | None = None,
    *,
    settings: Settings | None = None,
    structure: Structure | None = None,
    forward: Forward = call,
) -> Iterator[Event]:
    """Apply the plan to the model in place; yields as it goes, and works only while the caller takes the events.

    structure: every weight that the plan may name; found anew when None. Raises before any work: PlanError (the plan does not fit),
    DataError (the solver needs data), ConfigError (the work folder is another run's, or in use). On the way: StatisticsError, SolveError,
    WalkError, SaveError, all naming the layer or file.
    """
    if not hasattr(solver, "solve"):
        raise ConfigError(f"solver={solver!r}: give a solver, such as layerwise.solvers.Wanda().")
    settings = settings or Settings()
    structure = structure or structure_of(model, include=["*"])
    ways = check(plan, structure)
    units = units_of(model, structure, ways)
    check_solver(solver, ways, structure, data)
    ranks = Ranks() if settings.alone else Ranks.current()
    if store_of(model) is not None and not settings.work:
        raise ConfigError("a streamed model needs a work folder to keep its finished blocks in: Settings(work=...).")
    with _opened(settings.work, ranks) as work:
        if work is not None:
            key = run_key(model, plan, solver, data, settings, structure)
            ranks.first_alone(partial(work.begin, key))
        steps = _Steps(model, ways, solver, settings, ranks, work, len(units))
        if solver.needs == "none" or data is None:
            for index, unit in enumerate(units):
                yield from steps.without_data(unit, index)
            return
        with spilling(model, settings.spill):
            yield from _with_data(model, units, ranks.share_of(data), steps, forward)


def check(plan: Plan, structure: Structure) -> dict[str, Treatments]:
    """Layer name -> what is done to its weights, for layers that lose something. Raises PlanError with everything that does not fit.

    Bits of the KV cache and what is said of training change no weight: they are checked here, and applied by whoever makes the cache or
    trains.
    """
    plan.check(
        structure.layers,
        blocks=[block.name for block in structure.blocks],
        attentions=structure.attentions,
        fingerprint=structure.fingerprint,
    )
    other = [
        f'plan: layer "{name}": {field} cannot be applied by this version; it applies prune, quantize and factorize.'
        for name, treatments in plan.layers.items()
        for field in sorted(treatments.model_fields_set - {"prune", "quantize", "factorize", "cache", "train"})
        if getattr(treatments, field) is not None
    ]
    if other:
        raise PlanError(other)
    return {
        name: Treatments(prune=one.prune, quantize=one.quantize, factorize=one.factorize)
        for name, one in plan.layers.items()
        if one.quantize or one.factorize or (one.prune and one.prune.sparsity > 0)
    }


def check_solver(solver: Solver, ways: Mapping[str, Treatments], structure: Structure, data: Batches | None) -> None:
    """Raise DataError or PlanError unless this solver can do all of it: what would stop the last block stops the first."""
    blindly = '"round_to_nearest" or "hqq"' if "quantize" in solver.treats else '"magnitude" or "random"'
    if solver.needs != "none" and ways and (data is None or len(data) == 0):
        if "factorize" in solver.treats:
            raise DataError(f'solver "{solver.name}" needs calibration data.')
        raise DataError(f'solver "{solver.name}" needs calibration data; {blindly.split(" ")[0]} needs none.')
    kinds = {layer.name: layer.kind for layer in structure.layers}
    if other := [
        one for one in structure.layers if one.name in ways and ways[one.name].factorize and not factorable(one)
    ]:
        what = f"a {other[0].kind} layer" if not other[0].tied else f"tied to {other[0].tied[0]}"
        raise PlanError(
            f'plan: layer "{other[0].name}" is {what}; factorize is for linears with a weight of their own ({len(other)} such layers).'
            " Leave it out."
        )
    if solver.needs != "none" and (blind := [n for n in ways if kinds[n] in ("embedding", "table")]):
        raise PlanError(
            f'plan: layer "{blind[0]}" multiplies no input, so solver "{solver.name}" has nothing to look at ({len(blind)} such'
            f" layers). Leave it out, or use {blindly}."
        )
    if refused := {name: why for name, way in ways.items() if (why := refusal(solver, way))}:
        name, why = next(iter(refused.items()))
        raise PlanError(f'plan: layer "{name}": {why} ({len(refused)} such layers).')


def units_of(model: nn.Module, structure: Structure, ways: Mapping[str, Treatments]) -> list[Unit]:
    """Every block, treated or not (passes must be able to stop there), and the modules outside blocks of which a layer is."""
    lone = structure.lone
    units = [Unit(b.name, tuple(layer for layer in b.layers if layer.name in ways)) for b in (*lone, *structure.blocks)]
    return [unit for index, unit in enumerate(units) if unit.layers or index >= len(lone)]


def weights_key(model: nn.Module, structure: Structure) -> str:
    """16 hexadecimal digits that tell one set of weights from another."""
    weights = hashlib.sha256(structure.fingerprint.encode())
    if (store := store_of(model)) is not None:
        weights.update(store.fingerprint.encode())
    else:
        for name, parameter in model.named_parameters():  # bytes, not sums: those depend on the number of threads
            weights.update(f"{name}{parameter.dtype}".encode())
            plain = parameter.detach().cpu().contiguous().flatten()
            weights.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return weights.hexdigest()[:16]


def run_key(
    model: nn.Module, plan: Plan, solver: Solver, data: Batches | None, settings: Settings, structure: Structure
) -> dict[str, str]:
    """Everything that the result depends on, in a form that shows what differs."""
    return {
        "model": weights_key(model, structure),
        "plan": hashlib.sha256(repr(sorted(plan.to_dict()["layers"].items())).encode()).hexdigest()[:16],
        "solver": repr({"name": solver.name, **asdict(solver)}),  # type: ignore[call-overload]
        "data": data.hash if data is not None else "none",
        "propagate": settings.propagate,
        "seed": str(settings.seed),
        "layerwise": __version__,
        "torch": torch.__version__,
    }


def _opened(work: str | Work | None, ranks: Ranks) -> AbstractContextManager[Work | None]:
    """The work folder, locked for this run by its first rank; one that the caller has entered stays open."""
    if work is None or isinstance(work, Work):
        return nullcontext(work)
    return Work(work, lock=ranks.rank == 0)


def _with_data(
    model: nn.Module, units: list[Unit], batches: list[Batch], steps: "_Steps", forward: Forward
) -> Iterator[Event]:
    by_name = {unit.name: unit for unit in units}
    waiting = {unit.name for unit in units if unit.layers}
    with PausedPasses(model, list(by_name), batches, forward) as passes:
        yield PassesWaiting(waiting_of(passes))
        for index, (name, standing) in enumerate(passes):
            unit = by_name[name]
            waiting.discard(name)
            outputs = yield from steps.with_data(unit, index, standing, last=not waiting)
            if not waiting:
                return
            while standing:  # one by one, so that old inputs are freed as new ones come
                standing.pop(0).go_on(outputs.pop(0))
    if waiting:
        missed = next(unit.name for unit in units if unit.name in waiting)
        raise WalkError(f'no calibration batch reaches "{missed}"; exclude its layers or give data that does.')


@dataclass
class _Steps:
    """What is done at one unit."""

    model: nn.Module
    ways: Mapping[str, Treatments]
    solver: Solver
    settings: Settings
    ranks: Ranks
    work: Work | None
    total: int

    def without_data(self, unit: Unit, index: int) -> Iterator[Event]:
        """Solve a unit from its weights alone."""
        yield BlockStarted(unit.name, index, self.total)
        started = time.perf_counter()
        resumed = self._finished(unit)
        with at_hand(self.model, unit.name, self.settings.device) as module:
            if resumed:
                yield from self._resume(unit)
            else:
                groups = [SharedInput([layer], [None] * layer.matrices) for layer in unit.layers]
                yield from self._solve(unit, groups, module)
        yield BlockFinished(unit.name, index, self.total, {"solve": time.perf_counter() - started}, resumed)

    def with_data(
        self, unit: Unit, index: int, standing: list[Pass], *, last: bool
    ) -> Generator[Event, None, list[object]]:
        """Collect, solve, and compute what each pass goes on with (nothing after the last unit). Returns the outputs."""
        yield BlockStarted(unit.name, index, self.total)
        seconds, device = {"collect": 0.0, "solve": 0.0, "propagate": 0.0}, self.settings.device
        resumed, dense = self._finished(unit), self.settings.propagate == "dense"
        outputs: list[object] = []
        with at_hand(self.model, unit.name, device) as module:
            started = _now()
            groups: list[SharedInput] = []
            if unit.layers and not resumed:
                keep = dense and not last
                with Collector(self.model, unit.layers, self.solver.needs, stop_early=not keep) as collector:
                    for one in standing:
                        output = collector.run(one, device, fresh=one is standing[0] or standing[0].wrote)
                        if keep:
                            outputs.append(output)
                groups = self.ranks.agree(collector.groups())
            elif dense and not last:  # the dense block's output, before finished weights are read
                outputs = [one.run(device, fresh=True) for one in standing]
            seconds["collect"], started = _now() - started, _now()
            if resumed:
                yield from self._resume(unit)
            elif unit.layers:
                for group in groups:
                    first = group.layers[0]
                    self.ranks.add_up(group.accumulators, first.columns, self.solver.needs, _device_of(module))
                yield from self._solve(unit, groups, module)
            seconds["solve"], started = _now() - started, _now()
            if not last and not dense:
                outputs = [one.run(device, fresh=standing[0].wrote) for one in standing]
            seconds["propagate"] = _now() - started
        yield BlockFinished(unit.name, index, self.total, seconds, resumed)
        return outputs

    def _finished(self, unit: Unit) -> bool:
        """Rank 0 looks, for all: it writes the files, and a rank that comes late would see what this run has just written."""
        if self.work is None or not unit.layers:
            return False
        return self.ranks.share_object(self.work.finished(unit.name), 0)

    def _solve(self, unit: Unit, groups: list[SharedInput], module: nn.Module) -> Iterator[LayerSolved]:
        solved = []
        for event in solve_groups(self.model, groups, self.ways, self.solver, self.settings.seed, self.ranks):
            solved.append(event)
            yield event
        if self.work and unit.layers and self.ranks.rank == 0:
            tensors = {f"{unit.name}.{name}": parameter for name, parameter in module.named_parameters()}
            self.work.write(unit.name, tensors, solved)
        self.ranks.wait()
        self._keep(unit)

    def _resume(self, unit: Unit) -> Iterator[LayerSolved]:
        assert self.work is not None  # noqa: S101  (only then is a unit finished)
        yield from self.work.read_into(self.model, unit.name)
        self._keep(unit)

    def _keep(self, unit: Unit) -> None:
        """A streamed block is read from the work folder from now on."""
        if self.work and unit.layers and (store := store_of(self.model)) is not None:
            store.replace(unit.name, self.work.path(unit.name))


def _now() -> float:
    """Seconds, with what was queued on an accelerator done: else its time would be booked on a later step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
