"""What layers lose at every level of bits, measured with a solver: in the outputs of each layer, or in the model's predictions.

Two measures, both of a layer (or of what shares its level) that alone is solved, all others being dense. Output errors cost one pass over
the model, and one forward and backward pass more if the loss's gradient weighs them. The divergence of the predictions sees what the
layers behind make of an error, also of one that is large or alike in all tokens, and costs a pass from the layer's block on for each
level.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LayerwiseError, ScoreError
from ..passes import InputStatistics, Recording, Replays, check_whole, collect_dense
from ..randomness import generator_for
from ..scores import output_error, output_gradients, tell
from ..solvers import Solver, for_dtype
from ..structure import Layer, as_matrices, from_matrices, parameter_of
from ..tasks import Yardstick, left_alone
from ..tasks.batches import Batch, Batches, first_samples
from .handing_out import Hand

Weighting = Literal["gradient", "relative", "plain"]
LevelErrors = dict[str, dict[int, float]]  # name -> level -> error

_MOST = 2**26  # numbers of the dense model's predictions that are kept, as in `Yardstick`


def output_errors(
    model: nn.Module, data: Batches, hand: Hand, solver: Solver, weighting: Weighting, seed: int = 0
) -> tuple[LevelErrors, list[str]]:
    """Layer name -> level -> error of its outputs, and what the user should know. Layers that share an input are solved together.

    weighting: outputs count by the loss's gradient, as shares of the layer's outputs, or as they are. A matrix that no token reached (an
    expert) adds nothing, which is in the notes; a layer whose inputs cannot be seen is not in the result.
    """
    gradients = output_gradients(model, data, hand.structure) if weighting == "gradient" else {}
    found: LevelErrors = {}
    unreached = 0
    for one in solved_layers(model, data, hand, solver, seed):
        for place, layer in enumerate(one.layers):
            of = found.setdefault(layer.name, dict.fromkeys(hand.settings.chosen_levels, 0.0))
            if one.inputs is None or one.inputs.gram is None:
                unreached += 1
                continue
            matrix = one.matrices[place]
            weights = _importance(weighting, layer, one.index, matrix, one.inputs, gradients)
            for level, solved in one.weights.items():
                of[level] += output_error(matrix - solved[place], one.inputs.gram, weights)
    return found, [f"{unreached} matrices met no token: what they lose counts as nothing."] if unreached else []


def divergences(
    model: nn.Module, data: Batches, hand: Hand, solver: Solver, samples: int, seed: int = 0
) -> tuple[LevelErrors, list[str]]:
    """Unit name -> level -> KL divergence of the model's predictions from the dense ones, nats per token, when it alone is solved.

    samples: of the data, for the divergence; statistics for the solver come from all. Kept meanwhile: what every block gives on those
    samples and, for a solver that needs statistics, the weights of all levels. The model is as it was afterwards. Raises ModelError
    for a streamed model, ScoreError naming the unit whose divergence is not finite.
    """
    check_whole(model, "a measure of divergence")
    chosen = first_samples(data, samples)
    kept: dict[tuple[str, int], Tensor] = {}
    if solver.needs != "none":
        for one in solved_layers(model, data, hand, solver, seed):
            _keep(kept, one, model)
    with left_alone([model]):
        yards = {id(batch): Yardstick(model, [batch], _MOST // len(chosen)) for batch in chosen}

    def moved(changed: nn.Module, batch: Batch) -> Tensor:
        return yards[id(batch)].rows(changed).mean()

    found: LevelErrors = {}
    with Replays(model, [block.name for block in hand.structure.blocks], moved, tail="exact") as replays:
        recordings = [replays.record(batch, index) for index, batch in enumerate(chosen)]
        for unit, layers in hand.units.items():
            tell(len(found), len(hand.units), unit)
            found[unit] = {}
            for level in hand.settings.chosen_levels:
                new = [_new_weight(model, layer, level, hand, solver, kept, seed) for layer in layers]
                value = _with_weights(replays, recordings, layers, new)
                if not math.isfinite(value):
                    raise ScoreError(f'"{unit}" at {level} bits: the divergence of the predictions is {value}.')
                found[unit][level] = max(0.0, value)
    tell(len(hand.units), len(hand.units))
    notes = [] if len(chosen) == len(data) else [f"divergences on {sum(map(_samples, chosen))} samples of the data."]
    return found, notes


@dataclass(frozen=True)
class _Solved:
    """Matrix `index` of layers that share an input, solved at every level. inputs None: no token came, nothing was solved."""

    layers: Sequence[Layer]
    index: int
    inputs: InputStatistics | None
    matrices: Sequence[Tensor]  # float32, as they were
    weights: Mapping[int, Sequence[Tensor]]  # level -> as they would be


def solved_layers(model: nn.Module, data: Batches, hand: Hand, solver: Solver, seed: int) -> Iterator[_Solved]:
    """Every layer of the hand whose inputs can be seen, block by block on the dense model; errors of the solver name the layers."""
    names = {layer.name for layers in hand.units.values() for layer in layers}
    done = 0
    for block, statistics in collect_dense(model, hand.structure, data, "gram", outside=True):
        tell(done, len(names), block.name)
        for layers in _sharing([layer for layer in block.layers if layer.name in names], statistics):
            done += len(layers)
            for index, inputs in enumerate(statistics[layers[0].name]):
                if inputs is None or inputs.gram is None or not inputs.tokens:
                    yield _Solved(layers, index, None, (), {})
                    continue
                device = inputs.gram.device
                stored = [as_matrices(parameter_of(model, layer).detach(), layer)[index] for layer in layers]
                matrices = [matrix.float().to(device) for matrix in stored]
                like_applied = for_dtype(solver, stored[0].dtype)
                weights = {
                    level: _solve(layers, index, matrices, inputs, hand, like_applied, level, seed)
                    for level in hand.settings.chosen_levels
                }
                yield _Solved(layers, index, inputs, matrices, weights)
    tell(len(names), len(names))


def _solve(
    layers: Sequence[Layer],
    index: int,
    matrices: Sequence[Tensor],
    inputs: InputStatistics | None,
    hand: Hand,
    solver: Solver,
    level: int,
    seed: int,
) -> list[Tensor]:
    treatments: list[Any] = [hand.treatment(layer, level) for layer in layers]
    draws = [generator_for(seed, f"{layer.name}:{index}") for layer in layers]
    try:
        solved = solver.solve(matrices, inputs if solver.needs != "none" else None, treatments, draws)
    except LayerwiseError as error:  # a solver does not know which layer it works on
        raise type(error)(f'layer "{", ".join(layer.name for layer in layers)}": {error}') from error
    return [one.weight for one in solved]


def _sharing(layers: Sequence[Layer], statistics: Mapping[str, list[InputStatistics | None]]) -> list[list[Layer]]:
    """Layers by the input that they share: `collect_dense` hands out one list for all of them."""
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(id(statistics[layer.name]), []).append(layer)
    return list(groups.values())


def _importance(
    weighting: Weighting,
    layer: Layer,
    index: int,
    matrix: Tensor,
    inputs: InputStatistics,
    gradients: Mapping[str, Tensor],
) -> Tensor | None:
    """(rows,) what the squared error of each output is multiplied with; None: 1."""
    if weighting == "gradient":
        return gradients[layer.name][index] / inputs.tokens
    if weighting == "relative":
        assert inputs.gram is not None  # noqa: S101  (asked for)
        size = output_error(matrix, inputs.gram)
        return torch.full((layer.rows,), 1 / size if size else 0.0)
    return None


def _keep(kept: dict[tuple[str, int], Tensor], one: _Solved, model: nn.Module) -> None:
    """Write the matrices of every level where whole weights are collected; those that met no token stay as they were."""
    for place, layer in enumerate(one.layers):
        for level, solved in one.weights.items():
            weight = parameter_of(model, layer).detach()
            new = kept.setdefault((layer.name, level), as_matrices(weight, layer).clone())
            new[one.index] = solved[place].to(new)


def _new_weight(
    model: nn.Module,
    layer: Layer,
    level: int,
    hand: Hand,
    solver: Solver,
    kept: Mapping[tuple[str, int], Tensor],
    seed: int,
) -> Tensor:
    """The layer's weight at this level, as it is stored; the weight itself where nothing could be solved."""
    weight = parameter_of(model, layer).detach()
    if solver.needs != "none":
        known = kept.get((layer.name, level))
        return weight if known is None else from_matrices(known, layer)
    solver = for_dtype(solver, weight.dtype)
    solved = [
        _solve([layer], index, [matrix.float()], None, hand, solver, level, seed)[0]
        for index, matrix in enumerate(as_matrices(weight, layer))
    ]
    return from_matrices(torch.stack(solved), layer).to(weight)


def _with_weights(
    replays: Replays, recordings: Sequence[Recording], layers: Sequence[Layer], new: Sequence[Tensor]
) -> float:
    """Mean divergence over the batches with these weights, which are swapped, not changed."""
    weights = [parameter_of(replays.model, layer) for layer in layers]
    kept = [weight.data for weight in weights]
    # a tied tensor may be used before its block, and a unit of several blocks has no first one
    blocks = {None if layer.tied else layer.block for layer in layers}
    start = blocks.pop() if len(blocks) == 1 else None
    try:
        for weight, value in zip(weights, new, strict=True):
            weight.data = value.contiguous()
        values = [
            0.0 if start is not None and start not in one.outputs else replays.loss_from(one, start)
            for one in recordings
        ]
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.data = value
    return math.fsum(value * _samples(one.batch) for value, one in zip(values, recordings, strict=True)) / sum(
        _samples(one.batch) for one in recordings
    )


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))
