"""`compress`: the walk, taken to its end, with what came of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import DataError
from ..passes import Forward, Waiting, store_of
from ..plan import Plan
from ..solvers.base import Solver
from ..solvers.codes import Codes
from ..solvers.factors import Factors
from ..structure import Structure, parameter_of, structure_of
from ..tasks.batches import Batches, call
from .events import BlockFinished, BlockStarted, BlockTuned, Event, LayerSolved, PassesWaiting
from .settings import Settings
from .tuning import Tuner
from .walk import walk
from .work import Kept, Work


@dataclass(frozen=True)
class Result:
    """What a walk did. `seconds`: collect, solve, propagate, tune where it was, and total wall time. `kept`: weights of the layers that
    the plan names and leaves whole; they count in its budget. `codes`: of each quantized layer, on the CPU, a byte a weight; the matrices
    of a layer (experts, groups of a convolution) row under row. `factors`: of each factorized layer. Of a streamed model both are read
    from the work folder when asked for. `tuned`: of each block that was tuned."""

    layers: tuple[LayerSolved, ...]
    seconds: dict[str, float]
    solver: dict[str, Any]
    data: dict[str, Any]
    kept: int = 0
    waiting: Waiting | None = None  # the estimate of what calibration held in memory; None without calibration
    codes: Mapping[str, Codes] = field(default_factory=dict, repr=False, compare=False)
    factors: Mapping[str, Factors] = field(default_factory=dict, repr=False, compare=False)
    tuned: tuple[BlockTuned, ...] = ()
    model_bits: float | None = (
        None  # true bits per parameter, dense parts counted; None if nothing was quantized or factorized
    )

    @property
    def zeros(self) -> int:
        """Weights that are zero in the layers that were pruned; in quantized ones not those that have the code of zero."""
        return sum(layer.zeros for layer in self.layers if layer.pruned)

    @property
    def size(self) -> int:
        """Weights of all layers that the plan shares its zeros over, pruned or kept whole."""
        return sum(layer.size for layer in self.layers if layer.pruned) + self.kept

    @property
    def sparsity(self) -> float:
        """Zeros over `size`, as the plan's budget counts; 0.0 if there were no layers."""
        return self.zeros / self.size if self.size else 0.0

    @property
    def bits(self) -> float | None:
        """True bits per weight of the quantized and factorized layers, all that is stored counted; None if there are none."""
        return _mean([(layer.size, layer.bits) for layer in self.layers])

    @property
    def nominal_bits(self) -> float | None:
        """Bits of the codes alone."""
        return _mean([(layer.size, layer.nominal_bits) for layer in self.layers])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: fallbacks, raised dampings, experts without tokens; with the layer's name."""
        return tuple(f"{layer.layer}: {note}" for layer in self.layers for note in layer.notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: everything but codes and factors."""
        plain = asdict(replace(self, codes={}, factors={}))
        for one in (plain, *plain["layers"]):
            del one["codes"], one["factors"]
        return {
            **plain,
            "bits": self.bits,
            "nominal_bits": self.nominal_bits,
            "zeros": self.zeros,
            "size": self.size,
            "sparsity": self.sparsity,
            "notes": list(self.notes),
        }


def _mean(bits: Sequence[tuple[int, float | None]]) -> float | None:
    """Over (weights, bits per weight) where it is known; None if it is nowhere."""
    known = [(size, each) for size, each in bits if each is not None]
    return sum(size * each for size, each in known) / sum(size for size, _ in known) if known else None


def compress(
    model: nn.Module,
    plan: Plan,
    *,
    solver: Solver,
    data: Batches | None = None,
    settings: Settings | None = None,
    structure: Structure | None = None,
    forward: Forward = call,
    progress: Callable[[Event], None] | None = None,
    tuner: Tuner | None = None,
) -> Result:
    """Apply the plan to the model in place, block by block. Errors as of `walk`.

    tuner: tunes every solved block before the next is met, such as `recover.Reconstruction()`.
    data: calibration batches; a solver that looks at weights alone needs none. progress: called with every event.
    """
    if data is not None and not isinstance(data, Batches):  # else it shows when the model is pruned already
        raise DataError(f"data is a {type(data).__name__}: wrap its batches, which are dictionaries of what forward takes:"
                        " Batches(tuple(data), {}).")  # fmt: skip
    started = time.perf_counter()
    structure = structure or structure_of(model, include=["*"])
    layers: list[LayerSolved] = []
    codes: dict[str, Codes] = {}
    factors: dict[str, Factors] = {}
    coded: dict[str, str] = {}  # quantized layer -> block
    factored: dict[str, str] = {}
    streamed, block = store_of(model) is not None, ""
    tuned: list[BlockTuned] = []
    waiting: Waiting | None = None
    seconds = {"collect": 0.0, "solve": 0.0, "propagate": 0.0}
    for event in walk(model, plan, solver, data, settings=settings, structure=structure, forward=forward, tuner=tuner):
        if progress is not None:
            progress(event)
        if isinstance(event, LayerSolved):
            layers.append(replace(event, codes=None, factors=None))
            if event.codes is not None:
                coded[event.layer] = block
                if not streamed:
                    codes[event.layer] = event.codes
            if event.factors is not None:
                factored[event.layer] = block
                if not streamed:
                    factors[event.layer] = event.factors
        elif isinstance(event, BlockStarted):
            block = event.block
        elif isinstance(event, BlockTuned):
            tuned.append(event)
        elif isinstance(event, PassesWaiting):
            waiting = event.waiting
        elif isinstance(event, BlockFinished):
            for part, spent in event.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + spent
    if (on_grids := _on_grids(model, layers)) or hasattr(model, "layerwise_quantized"):
        model.layerwise_quantized = on_grids  # type: ignore[assignment]
    seconds["total"] = time.perf_counter() - started
    facts = {**data.protocol, "hash": data.hash} if data is not None and (solver.needs != "none" or tuner) else {}
    solved = {layer.layer for layer in layers}
    whole = plan.zeros(structure.layers).keys() - solved
    kept = sum(layer.size for layer in structure.layers if layer.name in whole)
    return Result(
        tuple(layers),
        seconds,
        {"name": solver.name, **asdict(solver)},  # type: ignore[call-overload]
        facts,
        kept,
        waiting,
        Kept(_work(settings).codes_of, coded) if streamed and coded else codes,
        Kept(_work(settings).factors_of, factored) if streamed and factored else factors,
        tuple(tuned),
        _model_bits(model, structure, layers) if coded or factored else None,
    )


def _on_grids(model: nn.Module, layers: Sequence[LayerSolved]) -> tuple[str, ...]:
    """The layers whose weights lie on a grid now: training them would take them off it (`recover.quantized`)."""
    before: tuple[str, ...] = getattr(model, "layerwise_quantized", ())
    solved = {layer.layer: layer.nominal_bits is not None for layer in layers}
    return (*(name for name in before if name not in solved), *(name for name, coded in solved.items() if coded))


def _work(settings: Settings | None) -> Work:
    work = settings.work if settings else None
    assert work is not None  # noqa: S101  (the walk has asked for it)
    return work if isinstance(work, Work) else Work(work, lock=False)


def _model_bits(model: nn.Module, structure: Structure, layers: list[LayerSolved]) -> float:
    """True bits per parameter of the whole model: codes with their scales and zeros, everything else in its dtype; tied tensors once."""
    dense = sum(8 * p.element_size() * p.numel() for p in model.parameters())
    known = {layer.name: layer for layer in structure.layers}
    for layer in layers:
        if layer.bits is not None:
            parameter = parameter_of(model, known[layer.layer])
            dense += round((layer.bits - 8 * parameter.element_size()) * layer.size)
    return dense / sum(p.numel() for p in model.parameters())
