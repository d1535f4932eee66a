"""Solving the layers of one block: those that share an input together, each written back in its own storage."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import LayerwiseError, SolveError
from ..passes import InputStatistics, SharedInput
from ..plan import Prune
from ..randomness import generator_for
from ..solvers.base import Solved, Solver
from ..solvers.select import spread
from ..structure import Layer, as_matrices, from_matrices, parameter_of
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
    prunes: Mapping[str, Prune],
    solver: Solver,
    seed: int,
    ranks: Ranks,
) -> Iterator[LayerSolved]:
    """Write the new weight of every layer of these groups into the model. Groups are spread over the ranks."""
    costs = [sum(layer.size * layer.columns for layer in group.layers) for group in groups]
    owners = ranks.owners(costs)
    found: list[list[LayerSolved]] = []
    for group, owner in zip(groups, owners, strict=True):
        found.append(solve_group(model, group, prunes, solver, seed) if owner == ranks.rank else [])
    for group, owner, events in zip(groups, owners, found, strict=True):
        for layer in group.layers:
            ranks.share(parameter_of(model, layer).data, owner)
        yield from ranks.share_object(events, owner)


def solve_group(
    model: nn.Module, group: Group, prunes: Mapping[str, Prune], solver: Solver, seed: int
) -> list[LayerSolved]:
    """Solve the layers of one input together, matrix by matrix (one for a linear, one per group or expert otherwise)."""
    first = group.layers[0]
    try:
        statistics = group.statistics() if solver.needs != "none" else [None] * first.matrices
        weights = [as_matrices(parameter_of(model, layer).detach(), layer).float() for layer in group.layers]
        shares = [per_matrix(layer, prunes[layer.name]) for layer in group.layers]
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
            _event(layer, parameter, [s[position] for s in solved], [s[position] for s in sizes], statistics, solver)
        )
    return events


def per_matrix(layer: Layer, prune: Prune) -> list[Prune]:
    """The layer's exact count of zeros (`Prune.zeros`), spread over its matrices in whole weights, rows, columns or blocks."""
    if layer.matrices == 1 or prune.nm:  # n:m leaves no choice
        return [prune] * layer.matrices
    unit = prune.unit(layer.rows, layer.columns)
    each, wanted = layer.rows * layer.columns // unit, prune.zeros(layer.size, layer.rows, layer.columns) // unit
    counts = spread(wanted, [each] * layer.matrices)
    return [Prune(sparsity=count / each, pattern=prune.pattern) for count in counts]


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
    parameter: Tensor,
    solved: Sequence[Solved],
    sizes: Sequence[float | None],
    statistics: Sequence[InputStatistics | None],
    solver: Solver,
) -> LayerSolved:
    errors, total = [one.error for one in solved], sum(size or 0.0 for size in sizes)
    known = [error for error in errors if error is not None]
    notes = [
        f"expert {index}: {note}" if layer.kind == "experts" else note
        for index, one in enumerate(solved)
        for note in one.notes
    ]
    return LayerSolved(
        layer=layer.name,
        size=layer.size,
        zeros=layer.size - int(torch.count_nonzero(parameter)),
        error=sum(known) / total if known and total > 0 else None,
        tokens=min((one.tokens if one else 0) for one in statistics) if solver.needs != "none" else None,
        notes=tuple(dict.fromkeys(notes)),  # a convolution in groups says the same for each of them
    )
