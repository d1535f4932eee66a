"""What a layer's blocks cost together, measured: the divergence of the model's predictions without the first so many of an order.

A quadratic form made where nothing is pruned says little of a layer that loses most of its blocks. A few measured shares of each layer set
its curve right; between them it keeps the form's own shape.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import ScoreError
from ..scores import tell
from ..solvers.select import expanded
from ..structure import Layer, as_matrices, from_matrices, parameter_of
from ..tasks import Batch, Yardstick, undisturbed
from ..tasks.batches import exactly

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)


def measured_curves(
    model: nn.Module,
    data: Sequence[Batch],
    layers: Sequence[Layer],
    orders: Mapping[str, Tensor],
    curves: Mapping[str, Sequence[float]],
    shape: tuple[int, int],
    samples: int,
) -> dict[str, list[float]]:
    """Layer name -> its curve through the divergences measured at SHARES of its blocks, every other layer whole.

    samples: of the data, one forward pass over them for each share of each layer. Weights are swapped and put back.
    Raises ScoreError naming a layer whose divergence is not finite, and what `tasks.Yardstick` raises.
    """
    found = {}
    with undisturbed([model]):
        yardstick = Yardstick(model, exactly(data, samples))
        for place, layer in enumerate(layers):
            tell(place, len(layers), layer.name)
            weight, order = parameter_of(model, layer), orders[layer.name]
            points = sorted({max(1, round(share * len(order))) for share in SHARES})
            dense, errors = weight.data, [0.0]
            try:
                for count in points:
                    weight.data = without(dense, layer, order[:count], shape)
                    errors.append(yardstick.divergence(model))
            finally:
                weight.data = dense
            if not torch.tensor(errors).isfinite().all():
                raise ScoreError(f'layer "{layer.name}": without its blocks the predictions are not finite.')
            found[layer.name] = through([0, *points], errors, curves[layer.name])
    tell(len(layers), len(layers))
    return found


def without(weight: Tensor, layer: Layer, gone: Tensor, shape: tuple[int, int]) -> Tensor:
    """A copy of a stored weight whose blocks `gone` (matrix after matrix, row by row) are zero."""
    height, width = shape
    keep = torch.ones(layer.size // (height * width), dtype=torch.bool, device=weight.device)
    keep[gone.to(weight.device)] = False
    grid = keep.reshape(layer.matrices, layer.rows // height, layer.columns // width)
    mask = torch.stack([expanded(one, height, width) for one in grid])
    return from_matrices(as_matrices(weight, layer).masked_fill(~mask, 0.0), layer).contiguous()


def through(points: Sequence[int], errors: Sequence[float], curve: Sequence[float]) -> list[float]:
    """A rising curve through errors at some counts, in between in proportion to how `curve` rises; where that is level, evenly."""
    shape, found = torch.tensor(curve, dtype=torch.float64).cummax(0).values.tolist(), [0.0]
    for (start, stop), high in zip(pairwise(points), errors[1:], strict=True):
        base = found[start]
        top, rise = max(base, high), shape[stop] - shape[start]
        for count in range(start + 1, stop + 1):
            part = (shape[count] - shape[start]) / rise if rise > 0 else (count - start) / (stop - start)
            found.append(base + (top - base) * part)
    return found
