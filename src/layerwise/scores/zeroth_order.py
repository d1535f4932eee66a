"""How much the loss feels a layer, from losses alone: the zeroth-order score of ECoFLaP (Sung et al. 2024, arXiv:2310.02998).

A layer is moved along random directions, both ways; the differences of the losses estimate the norm of its gradient. No backward
pass through the blocks, so the memory is that of inference.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ScoreError
from ..passes import Recording, Replays, Tail, check_whole
from ..passes.wrapping import not_reached
from ..randomness import generator_for
from ..structure import Layer, Structure, parameter_of
from ..tasks.batches import Batches, first_samples
from ..tasks.losses import Loss, loss_of
from .watching import tell

REFERENCE_STEP = 1e-3  # of the official code, whatever the size of the weights
HALF_FACTOR = 5.0  # the outputs of half-precision layers are rounded, too: a larger step stands out of that noise


def central_slope(above: float, below: float, step: float) -> float:
    """(above - below) / (2 * step): the slope of the loss along a direction z, from the losses at W + step z and W - step z.

    Exact for losses linear or quadratic in W, else to second order in the step. Raises ScoreError if it is not finite.
    """
    if not step > 0:
        raise ScoreError("the weights did not move: their precision swallows the step. Give a larger step.")
    slope = (above - below) / (2 * step)
    if not math.isfinite(slope):
        raise ScoreError(
            f"losses {above} and {below}: not finite. Look for overflow in the model, or give a smaller step."
        )
    return slope


def norm_from_slopes(slopes: Sequence[float]) -> float:
    """Estimate of the gradient's Frobenius norm: sqrt(pi / 2) * mean |slope|, slopes along directions z ~ N(0, 1).

    <gradient, z> is normal with that norm as its deviation, so E|slope| = sqrt(2 / pi) * norm. One draw is off by 76 % of the norm
    (standard deviation), n by 76 % / sqrt(n). The official score is the sum of |slope|: the same up to a common factor.
    """
    if not slopes:
        raise ScoreError("norm_from_slopes: there are no slopes.")
    return math.sqrt(math.pi / 2) * math.fsum(abs(slope) for slope in slopes) / len(slopes)


def moved(weight: Tensor, direction: Tensor, step: float) -> tuple[Tensor, Tensor, float]:
    """(W + step z, W - step z, squared length of half their difference), in the dtype of the weight, which is left alone.

    The sum is made in float32 and rounded once. Half precision rounds part of a step away; how far the weights really moved is
    therefore measured, not assumed.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    start, way = weight.to(wide), direction.to(weight.device, wide) * step
    above, below = (start + way).to(weight.dtype), (start - way).to(weight.dtype)
    half = (above.to(wide) - below.to(wide)) / 2
    return above, below, float(half.square().sum())


def zeroth_order_gradient(
    model: nn.Module,
    data: Batches,
    structure: Structure,
    *,
    step: float = 0.02,
    samples: int | None = None,
    draws: int = 1,
    joint: bool = False,
    reference: bool = False,
    tail: Tail = "linear",
    seed: int = 0,
    loss: Loss = loss_of,
) -> dict[str, float]:
    """Layer name -> estimated norm of the gradient of a batch's mean loss, averaged over batches; high = keep.

    step: root mean square of the perturbation over that of the weights; of weights in half precision five times that, since what the
    blocks give is rounded too and adds to the score. reference: 1e-3 for every layer instead, as the official code.
    samples: use the first batches that hold so many, None all. draws: directions per batch, so each layer has draws * batches slopes;
    two passes each, of the blocks from its own on (`passes.Replays`, which explains `tail`; its memory is what all blocks give for one
    batch). joint: move all layers of a block at once: block name -> norm of the block's gradient, for models of very many layers.
    Absolute gradients of batch means: compare only scores made with equal batches. A layer outside the blocks, or tied to another
    tensor, takes whole passes. Weights are swapped, not changed, so they end bit for bit as they were.
    Raises ScoreError naming the layer if a loss is not finite, WalkError if no batch reaches a block, and what `loss` raises.
    """
    if not step > 0 or draws < 1:
        raise ConfigError(
            f"zeroth_order_gradient: step={step:g}, draws={draws}: give a step above 0 and at least 1 draw."
        )
    check_whole(model, "a score of thousands of passes")
    units = list(_units(structure, joint))
    slopes: dict[str, list[float]] = {name: [] for name, _, _ in units}
    reached: set[str] = set()
    chosen = first_samples(data, samples)
    moves = len(chosen) * len(units)
    with Replays(model, [block.name for block in structure.blocks], loss, tail) as replays:
        for index, batch in enumerate(chosen):
            recording = replays.record(batch, index)
            reached.update(recording.order)
            for done, (name, block, layers) in enumerate(units, start=index * len(units)):
                tell(done, moves, f"{name}, batch {index}")
                if block is not None and block not in recording.outputs:  # its gradient is 0 in this batch
                    slopes[name] += [0.0] * draws
                    continue
                for draw in range(draws):
                    key = f"zeroth-order:{{}}:{index}:{draw}"
                    try:
                        size = REFERENCE_STEP if reference else step * _scale(model, layers)
                        slopes[name].append(_slope(replays, recording, block, layers, size, seed, key))
                    except ScoreError as error:
                        raise ScoreError(f'layer "{name}": {error}') from error
    tell(moves, moves)
    if missed := [block for _, block, _ in units if block is not None and block not in reached]:
        raise not_reached(missed[0])
    return {name: norm_from_slopes(found) for name, found in slopes.items()}


def _units(structure: Structure, joint: bool) -> Iterator[tuple[str, str | None, tuple[Layer, ...]]]:
    """(name, block, layers) of what is moved at once."""
    for block in structure.blocks:
        if joint and block.layers:
            yield block.name, block.name, block.layers
        elif not joint:
            yield from ((layer.name, block.name, (layer,)) for layer in block.layers)
    yield from ((layer.name, None, (layer,)) for layer in structure.outside)


def _scale(model: nn.Module, layers: Sequence[Layer]) -> float:
    """Root mean square of these weights (five times that in half precision); of weights that are all zero that of a fresh layer."""
    weights = [parameter_of(model, layer).detach() for layer in layers]
    squares = math.fsum(float(weight.float().square().sum()) for weight in weights)
    size = math.sqrt(squares / sum(layer.size for layer in layers)) or 1 / math.sqrt(layers[0].columns)
    return size * (HALF_FACTOR if weights[0].element_size() < 4 else 1.0)


def _slope(
    replays: Replays,
    recording: Recording,
    block: str | None,
    layers: Sequence[Layer],
    step: float,
    seed: int,
    key: str,
) -> float:
    """Along one direction drawn for these layers. key: of the stream, with a place for the layer's name."""
    weights = [parameter_of(replays.model, layer) for layer in layers]
    kept = [weight.data for weight in weights]
    start = None if any(layer.tied for layer in layers) else block  # a tied tensor may be used before its block
    aboves, belows = [], []
    length = went = 0.0
    for layer, weight in zip(layers, kept, strict=True):
        z = torch.randn(layer.shape, generator=generator_for(seed, key.format(layer.name)))
        above, below, moved_by = moved(weight, z, step)
        aboves.append(above)
        belows.append(below)
        length, went = length + float(z.square().sum()), went + moved_by
    try:
        losses = []
        for side in (aboves, belows):
            for weight, value in zip(weights, side, strict=True):
                weight.data = value
            losses.append(replays.loss_from(recording, start))
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.data = value
    return central_slope(losses[0], losses[1], math.sqrt(went / length))
