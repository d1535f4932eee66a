"""The rows that a layer's matrices are multiplied with: its input, flattened to (tokens, columns) for each matrix."""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import pad

from ..structure import Layer
from ..tasks.batches import Batch, has_encoder
from ..tasks.losses import IGNORED

Geometry = tuple[object, ...]  # two layers with one input tensor and equal geometry share their rows


def geometry_of(module: nn.Module) -> Geometry:
    """What, besides the input tensor, decides the rows: nothing for a linear, the window for a convolution."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return ()
    return (module.kernel_size, module.stride, module.padding, module.padding_mode, module.dilation, module.groups)


def input_rows(module: nn.Module, layer: Layer, inputs: Tensor) -> Tensor:
    """(matrices, tokens, columns): what each matrix of the layer sees; a view where possible.

    For a convolution the tokens are output positions and the columns (channels of the group, kernel positions), as in the
    layer's matrix view (im2col).
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        return inputs.reshape(1, -1, layer.columns)
    dimensions = len(module.kernel_size)
    inputs = inputs if inputs.dim() == dimensions + 2 else inputs[None]
    if module.padding_mode != "zeros":
        inputs = pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    else:
        inputs = pad(inputs, _zero_padding(module))
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        inputs = inputs.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # now (batch, channels, *positions, *kernel)
    batch, channels = inputs.shape[:2]
    positions, kernel = inputs.shape[2 : 2 + dimensions], inputs.shape[2 + dimensions :]
    grouped = inputs.reshape(batch, module.groups, channels // module.groups, positions.numel(), kernel.numel())
    return grouped.permute(1, 0, 3, 2, 4).reshape(module.groups, batch * positions.numel(), layer.columns)


def _zero_padding(module: nn.modules.conv._ConvNd) -> list[int]:
    """Padding in the order that `torch.nn.functional.pad` wants: last axis first, before and after."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    if module.padding == "same":
        return module._reversed_padding_repeated_twice
    sizes = cast(tuple[int, ...], module.padding)
    return [size for one in reversed(sizes) for size in (one, one)]


def mask_of(model: nn.Module, batch: Batch, path: str) -> Tensor | None:
    """The attention mask of the tokens that the module of this path sees, 0 at padding.

    Of an encoder-decoder model the decoder's tokens have a mask of their own, and the head sees those; OPT too calls its only stack a
    decoder, and a BERT that decodes has an encoder inside. A model that is given nothing for its decoder feeds it the labels, moved on by
    one, or, where those are no tokens, its own input (a BART that classifies).
    """
    sides = (part for part in path.split(".") if part.endswith(("encoder", "decoder")))
    fed = "decoder_input_ids" in batch
    if not (fed or has_encoder(model)) or not next(sides, "decoder").endswith("decoder"):
        return batch.get("attention_mask")
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if fed or mask is not None:
        return mask
    return labels != IGNORED if labels is not None and labels.ndim == 2 else batch.get("attention_mask")


def real_of(mask: Tensor | None) -> Tensor | None:
    """(batch * length,) bool, False where padding is; None where there is none. mask: (batch, length), 0 at padding, or None."""
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.reshape(-1).bool()


def real_tokens(rows: Tensor, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Leave out padding: rows of (batch, length) positions, flattened or not, whose attention mask is 0.

    mask: (batch, length) or None. Flattened is told by the count alone: a router is handed that, and experts that every token meets.
    """
    real = real_of(mask)
    if mask is None or real is None or rows.shape[0] != 1 or inputs.shape[:-1] not in (mask.shape, real.shape):
        return rows
    return rows[:, real.to(rows.device)]
