"""Solving the layers of one block: those that share an input together, each written back in its own storage."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import LayerwiseError, SolveError
from ..passes import InputStatistics, SharedInput
from ..plan import Prune, Treatments
from ..randomness import generator_for
from ..solvers.base import Solved, Solver, for_dtype
from ..solvers.codes import stacked
from ..solvers.select import spread
from ..structure import Layer, as_matrices, from_matrices, parameter_of
from ..treatments import kept_text
from .events import LayerSolved
from .ranks import Ranks


class Group(Protocol):
    """Layers that see one input, with its statistics: `passes.SharedInput`, or anything that knows as much."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    def statistics(self) -> list[InputStatistics | None]: ...


def solve_groups(
    model: nn.Module,
    groups: Sequence[SharedInput],
    ways: Mapping[str, Treatments],
    solver: Solver,
    seed: int,
    ranks: Ranks,
) -> Iterator[LayerSolved]:
    """Write the new weight of every layer of these groups into the model. Groups are spread over the ranks."""
    costs = [sum(layer.size * layer.columns for layer in group.layers) for group in groups]
    owners = ranks.owners(costs)
    found: list[list[LayerSolved]] = []
    for group, owner in zip(groups, owners, strict=True):
        found.append(solve_group(model, group, ways, solver, seed) if owner == ranks.rank else [])
    for group, owner, events in zip(groups, owners, found, strict=True):
        for layer in group.layers:
            ranks.share(parameter_of(model, layer).data, owner)
        yield from ranks.share_object(events, owner)


def solve_group(
    model: nn.Module, group: Group, ways: Mapping[str, Treatments], solver: Solver, seed: int
) -> list[LayerSolved]:
    """Solve the layers of one input together, matrix by matrix (one for a linear, one per group or expert otherwise)."""
    first = group.layers[0]
    try:
        statistics = group.statistics() if solver.needs != "none" else [None] * first.matrices
        weights = [as_matrices(parameter_of(model, layer).detach(), layer).float() for layer in group.layers]
        shares = [_each_matrix(layer, ways[layer.name]) for layer in group.layers]
        solver = for_dtype(solver, parameter_of(model, first).dtype)
        new = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
        solved: list[list[Solved]] = []
        sizes: list[list[float | None]] = []
        for index in range(first.matrices):
            inputs = _or_none_seen(statistics[index], first, solver, weights[0].device)
            matrices = [weight[index] for weight in weights]
            generators = [generator_for(seed, f"{layer.name}:{index}") for layer in group.layers]
            solved.append(solver.solve(matrices, inputs, [share[index] for share in shares], generators))
            sizes.append(_output_sizes(matrices, inputs))
            for target, one in zip(new, solved[-1], strict=True):
                target[index] = one.weight
    except LayerwiseError as error:  # a solver does not know which layer it works on
        names = ", ".join(layer.name for layer in group.layers)
        raise type(error)(str(error) if f'"{first.name}"' in str(error) else f'layer "{names}": {error}') from error
    events = []
    for position, layer in enumerate(group.layers):
        parameter = parameter_of(model, layer)
        _store(parameter, from_matrices(new[position], layer), layer)
        events.append(
            _event(
                layer,
                ways[layer.name],
                parameter,
                [s[position] for s in solved],
                [s[position] for s in sizes],
                statistics if solver.needs != "none" else None,
            )
        )
    return events


def per_matrix(layer: Layer, prune: Prune) -> list[Prune]:
    """The layer's exact count of zeros (`Prune.zeros`), spread over its matrices in whole weights, rows, columns or blocks."""
    if layer.matrices == 1 or prune.nm:  # n:m leaves no choice
        return [prune] * layer.matrices
    unit = prune.unit(layer.rows, layer.columns)
    each = layer.rows * layer.columns // unit
    if (kept := prune.blocks_kept(each * layer.matrices)) is not None:
        parts = [kept[start : start + each] for start in range(0, len(kept), each)]
        return [Prune(sparsity=part.count(False) / each, pattern=prune.pattern, kept=kept_text(part)) for part in parts]
    wanted = prune.zeros(layer.size, layer.rows, layer.columns) // unit
    counts = spread(wanted, [each] * layer.matrices)
    return [Prune(sparsity=count / each, pattern=prune.pattern) for count in counts]


def dead_rows(height: int, solved: Sequence[Solved]) -> str:
    """What the user should know of block rows, `height` outputs each, in which no block is left; empty where there are none."""
    rows = [one.keep.reshape(len(one.keep) // height, -1).any(1) for one in solved]
    total, dead = sum(len(one) for one in rows), sum(int((~one).sum()) for one in rows)
    if not dead:
        return ""
    return f"{dead} of {total} block rows have no block left: {dead * height} outputs are their bias alone"


def _each_matrix(layer: Layer, way: Treatments) -> list[Treatments]:
    """What each matrix of the layer gets: its share of the zeros, and the same bits for all."""
    if way.prune is None or way.prune.sparsity == 0:
        return [way] * layer.matrices
    return [way.model_copy(update={"prune": prune}) for prune in per_matrix(layer, way.prune)]


def _store(parameter: Tensor, new: Tensor, layer: Layer) -> None:
    """Write a float32 weight in the parameter's own dtype; what was kept as it was stays bit-identical, in float64 too."""
    old = parameter.detach()
    if old.dtype == torch.float64:
        new = torch.where(new == old.float(), old, new.double())
    if old.dtype == torch.float16 and not new.half().isfinite().all():
        raise SolveError(
            f'layer "{layer.name}": its new weight overflows float16. Load the model in bfloat16 or float32 (--dtype).'
        )
    parameter.data.copy_(new)


def _or_none_seen(
    inputs: InputStatistics | None, layer: Layer, solver: Solver, device: torch.device
) -> InputStatistics | None:
    """No statistics where some were needed: no calibration token came to the expert, or nobody called the module (Mamba's convolution
    and `dt_proj` are weights that others use). The solver says what it does then."""
    if inputs is None and solver.needs != "none":
        return InputStatistics(0, torch.zeros(layer.columns, device=device), called=layer.kind == "experts")
    return inputs


def _output_sizes(weights: Sequence[Tensor], inputs: InputStatistics | None) -> list[float | None]:
    """||W X||^2 over the calibration tokens for each matrix, where the second moments are known."""
    if inputs is None or inputs.gram is None:
        return [None] * len(weights)
    stacked = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    rows = ((stacked @ inputs.gram) * stacked).sum(1)
    return [float(part.sum()) for part in torch.split(rows, [len(weight) for weight in weights])]


def _event(
    layer: Layer,
    way: Treatments,
    parameter: Tensor,
    solved: Sequence[Solved],
    sizes: Sequence[float | None],
    statistics: Sequence[InputStatistics | None] | None,
) -> LayerSolved:
    """statistics: None for a solver that looks at none."""
    errors, total = [one.error for one in solved], sum(size or 0.0 for size in sizes)
    known = [error for error in errors if error is not None]
    notes = [
        f"expert {index}: {note}" if layer.kind == "experts" else note
        for index, one in enumerate(solved)
        for note in one.notes
    ]
    notes += [dead_rows(way.prune.block[0], solved)] if way.prune and way.prune.block else []
    codes = [one.codes.to("cpu") for one in solved if one.codes is not None]
    whole = stacked(codes) if codes else None
    factors = solved[0].factors  # of linears alone: one matrix
    pruned = sum(one.keep.numel() - int(torch.count_nonzero(one.keep)) for one in solved)
    return LayerSolved(
        layer=layer.name,
        size=layer.size,
        zeros=layer.size - int(torch.count_nonzero(parameter)) if whole is None else pruned,
        error=sum(known) / total if known and total > 0 else None,
        tokens=None if statistics is None else min((one.tokens if one else 0) for one in statistics),
        notes=tuple(
            note for note in dict.fromkeys(notes) if note
        ),  # a convolution in groups says the same for each of them
        pruned=way.prune is not None,
        bits=whole.bits_per_weight if whole else factors.bits_per_weight if factors else None,
        nominal_bits=whole.bits if whole else None,
        codes=whole,
        factors=factors.to("cpu") if factors else None,
    )
