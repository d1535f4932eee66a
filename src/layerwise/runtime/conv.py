"""A convolution without the channels that are all zero."""

from typing import Any

import torch
from torch import Tensor, nn

from .forms import Form


def channels_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) of a convolution's weight (outputs, inputs, height, width) that have a weight which is not zero."""
    kept = (weight != 0).flatten(2).any(2)
    return kept.any(1).nonzero()[:, 0], kept.any(0).nonzero()[:, 0]


class NarrowConv2d(Form):
    """Output and input channels that are all zero are not there. Of one group; (batch, channels, height, width) as the convolution."""

    name = "narrow"

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight.detach().flatten(1), None)
        outputs, inputs = channels_of(conv.weight)
        self.shape = tuple(conv.weight.shape)
        self.biased = conv.bias is not None
        self.channels = conv.bias.detach() if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
        self.rows = outputs if len(outputs) < conv.out_channels else None
        self.columns = inputs if len(inputs) < conv.in_channels else None
        settings: dict[str, Any] = {
            "kernel_size": conv.kernel_size,
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "padding_mode": conv.padding_mode,
        }
        # with none left, one channel is computed and not used: the size of the result is the convolution's own business
        self.none = not len(outputs)
        first = torch.zeros(1, dtype=torch.int64, device=conv.weight.device)
        self.columns = first if self.none else self.columns
        rows, columns = (first, first) if self.none else (outputs, inputs)
        small = nn.Conv2d(len(columns), len(rows), device="meta", dtype=self.dtype, **settings)
        small = small.to_empty(device=self.device).requires_grad_(False)
        small.weight.copy_(conv.weight.detach()[rows][:, columns])
        bias: Tensor = small.get_parameter("bias")
        bias.copy_(self.channels[rows])
        # not as a submodule: what walks over the model's layers should not find it
        self.small = (small,)

    def applied(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch's own modules call it)
        return self.product(input)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.biased:
            destination[f"{prefix}bias"] = self.channels

    def product(self, x: Tensor) -> Tensor:
        dim = x.ndim - 3
        result: Tensor = self.small[0](x if self.columns is None else x.index_select(dim, self.columns))
        if self.rows is None:
            return result
        shape = list(result.shape)
        shape[dim] = self.out_features
        whole = self.channels[:, None, None].expand(shape).contiguous()
        return whole if self.none else whole.index_copy_(dim, self.rows, result)

    def parts(self) -> dict[str, Tensor]:
        indices = {"rows": self.rows, "columns": self.columns}
        return {"kept": self.small[0].weight} | {name: part for name, part in indices.items() if part is not None}

    def dense(self) -> Tensor:
        whole = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if not self.none:
            columns = torch.arange(self.shape[1], device=self.device) if self.columns is None else self.columns
            rows = torch.arange(self.shape[0], device=self.device) if self.rows is None else self.rows
            whole[rows[:, None], columns] = self.small[0].weight
        return whole

    def extra_repr(self) -> str:
        kept = tuple(self.small[0].weight.shape)
        return f"{self.shape[1]}, {self.shape[0]}, kernel_size={self.shape[2:]}, {kept[0]} outputs and {kept[1]} inputs computed"
