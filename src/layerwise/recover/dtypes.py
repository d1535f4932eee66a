"""A model in another dtype as loading would make it."""

import torch
from torch import nn


@torch.no_grad()
def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and saved buffers in this dtype, in place. Buffers that no file holds stay as they are: `model.to(dtype)` would round
    rotary frequencies, which models keep in float32, and every later position with them."""
    saved = {id(value) for value in model.state_dict(keep_vars=True).values()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and id(buffer) in saved:
                module._buffers[name] = buffer.to(dtype)
