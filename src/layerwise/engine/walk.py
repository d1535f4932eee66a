"""The walk: every block in running order gets statistics, new weights, and hands its own output on.

By default a block is measured on inputs that the compressed blocks before it produce (`propagate="compressed"`): each block runs twice,
once for statistics (up to the input of its last layer) and once with the new weights. `propagate="dense"` measures the untouched model in
one single pass instead: a run less per block, and statistics that do not know what went wrong before.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from ..errors import ConfigError, DataError, PlanError, WalkError
from ..passes import Forward, PausedPasses, spilling, store_of, waiting_of
from ..plan import Plan, Treatments
from ..solvers.base import Solver, group_bits_of, refusal
from ..structure import Structure, factorable, structure_of
from ..tasks.batches import Batch, Batches, call
from ..version import __version__
from .events import Event, PassesWaiting
from .ranks import Ranks
from .settings import Settings
from .steps import Steps, Unit
from .tuning import Tuner
from .work import Work


def walk(
    model: nn.Module,
    plan: Plan,
    solver: Solver,
    data: Batches | None = None,
    *,
    settings: Settings | None = None,
    structure: Structure | None = None,
    forward: Forward = call,
    tuner: Tuner | None = None,
) -> Iterator[Event]:
    """Apply the plan to the model in place; yields as it goes, and works only while the caller takes the events.

    structure: every weight that the plan may name; found anew when None. tuner: tunes every solved block before the next is met.
    Raises before any work: PlanError (the plan does not fit), DataError (solver or tuner needs data), ConfigError (the work folder is
    another run's, or in use; a tuner under torchrun). On the way: StatisticsError, SolveError, WalkError, SaveError, all naming the layer
    or file, and what the tuner raises.
    """
    if not hasattr(solver, "solve"):
        raise ConfigError(f"solver={solver!r}: give a solver, such as layerwise.solvers.Wanda().")
    settings = settings or Settings()
    structure = structure or structure_of(model, include=["*"])
    ways = check(plan, structure, solver)
    units = units_of(model, structure, ways)
    check_solver(solver, ways, structure, data)
    ranks = Ranks() if settings.alone else Ranks.current()
    if tuner is not None:
        _check_tuner(tuner, model, data, ranks)
    if store_of(model) is not None and not settings.work:
        raise ConfigError("a streamed model needs a work folder to keep its finished blocks in: Settings(work=...).")
    with _opened(settings.work, ranks) as work:
        if work is not None:
            key = run_key(model, plan, solver, data, settings, structure, tuner)
            ranks.first_alone(partial(work.begin, key))
        steps = Steps(model, ways, solver, settings, ranks, work, len(units), tuner)
        if data is None or (solver.needs == "none" and tuner is None):
            for index, unit in enumerate(units):
                yield from steps.without_data(unit, index)
            return
        with spilling(model, settings.spill):
            yield from _with_data(model, units, ranks.share_of(data), steps, forward)


def check(plan: Plan, structure: Structure, solver: Solver) -> dict[str, Treatments]:
    """Layer name -> what is done to its weights, for layers that lose something. Raises PlanError with everything that does not fit.

    A budget of bits is checked with the scales and zeros that this solver stores, whatever the plan was counted with.
    Bits of the KV cache and what is said of training change no weight: they are checked here, and applied by whoever makes the cache or
    trains.
    """
    plan.stored_with(group_bits_of(solver)).check(
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
    units = [
        Unit(one.name, tuple(layer for layer in one.layers if layer.name in ways), index >= len(lone))
        for index, one in enumerate((*lone, *structure.blocks))
    ]
    return [unit for index, unit in enumerate(units) if unit.layers or index >= len(lone)]


def _check_tuner(tuner: Tuner, model: nn.Module, data: Batches | None, ranks: Ranks) -> None:
    if data is None or len(data) == 0:
        raise DataError("blocks are tuned on calibration data: give some (--data).")
    if ranks.size > 1:
        raise ConfigError("blocks are tuned by one process alone: start one, without torchrun, or go without.")
    tuner.check(model, data)


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
    model: nn.Module,
    plan: Plan,
    solver: Solver,
    data: Batches | None,
    settings: Settings,
    structure: Structure,
    tuner: Tuner | None = None,
) -> dict[str, str]:
    """Everything that the result depends on, in a form that shows what differs."""
    return {
        "model": weights_key(model, structure),
        "plan": hashlib.sha256(repr(sorted(plan.to_dict()["layers"].items())).encode()).hexdigest()[:16],
        "solver": repr({"name": solver.name, **asdict(solver)}),  # type: ignore[call-overload]
        "data": data.hash if data is not None else "none",
        "propagate": settings.propagate,
        "seed": str(settings.seed),
        "tuned": "no" if tuner is None else repr(tuner.facts()),
        "layerwise": __version__,
        "torch": torch.__version__,
    }


def _opened(work: str | Work | None, ranks: Ranks) -> AbstractContextManager[Work | None]:
    """The work folder, locked for this run by its first rank; one that the caller has entered stays open."""
    if work is None or isinstance(work, Work):
        return nullcontext(work)
    return Work(work, lock=ranks.rank == 0)


def _with_data(
    model: nn.Module, units: list[Unit], batches: list[Batch], steps: Steps, forward: Forward
) -> Iterator[Event]:
    by_name = {unit.name: unit for unit in units}
    waiting = {unit.name for unit in units if unit.layers}
    if steps.tuner is not None and steps.tuner.target == "dense" and steps.settings.propagate == "compressed":
        steps.batches = len(batches)  # each goes through once more, past dense blocks alone
        batches = [*batches, *batches]
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
