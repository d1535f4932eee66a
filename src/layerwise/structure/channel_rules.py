"""The layers of a traced network and the channels that they read and write: `Reader` runs a trace on the meta device and keeps layouts.

Functions and methods between them are in `channel_functions.py`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .channel_functions import Functions, Seen, path_of
from .channel_layout import Layout, fix, new, repeated, tie, width

_SOFTMAX_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Softmin)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
_POOLING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d,
)  # fmt: skip
Kind = Literal["conv", "depthwise", "transposed", "linear", "norm"]


@dataclass
class Use:
    """A layer and the channels that it reads and writes."""

    name: str
    kind: Kind
    inputs: Layout
    outputs: Layout
    kernel: int = 1
    groups: int = 1
    positions: int = 0


class Reader(Functions):
    """Runs a traced module and keeps what is known of every tensor; `uses` are the layers in the order of their first call."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.uses: dict[str, Use] = {}

    def run_node(self, n: Node) -> Any:
        """The result, after its layout has been kept."""
        result = super().run_node(n)
        inputs = [self.seen[one] for one in n.all_input_nodes if isinstance(self.seen[one], Seen)]
        if n.op == "placeholder":
            self.seen[n] = _image(result)
        elif n.op == "output":
            for one in (seen for seen in map(self.seen.get, n.all_input_nodes) if seen is not None):
                for each in one if isinstance(one, list) else [one]:
                    fix(each.layout, "it is an output of the model")
        elif n.op == "get_attr":
            self.seen[n] = Seen(tuple(result.shape)) if isinstance(result, Tensor) else None
        elif n.op == "call_module":
            self.seen[n] = self._module(n, self.fetch_attr(str(n.target)), inputs, result)
        elif not isinstance(result, Tensor) and not _tensors(result):
            self.seen[n] = None  # sizes and other plain values
        else:
            self.seen[n] = self.function(n, inputs, result)
        return result

    # -- modules

    def _module(self, n: Node, module: nn.Module, inputs: list[Seen], result: Any) -> Any:
        if isinstance(module, CONVOLUTIONS):
            return self._convolution(n, module, inputs[0], result)
        if isinstance(module, TRANSPOSED):
            return self._transposed(n, module, inputs[0], result)
        if isinstance(module, nn.Linear):
            return self._linear(n, inputs[0], result)
        if isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU)):
            return self._norm(n, module, inputs[0])
        if isinstance(module, nn.Flatten):
            return self.reshaped(n, inputs[0], result, ())
        if isinstance(module, nn.PixelShuffle):
            each = module.upscale_factor**2
            units = new(width(inputs[0].layout) // each)
            tie(inputs[0].layout, repeated(units, each))
            return Seen(tuple(result.shape), inputs[0].axis, units)
        if isinstance(module, _SOFTMAX_MODULES):
            return self.softmax(inputs[0], module.dim)
        if isinstance(module, nn.Softmax2d):
            return self.softmax(inputs[0], -3)
        if isinstance(module, _ELEMENTWISE_MODULES):
            return inputs[0]
        if isinstance(module, _POOLING_MODULES):
            return self.pooled(n, inputs[0], result)
        raise self.refused(n, f"{type(module).__name__} has no rule")

    def _convolution(self, n: Node, module: Any, x: Seen, result: Tensor) -> Seen:
        x = self.along(n, x, 1)
        groups, outputs = module.groups, module.out_channels
        depthwise = groups > 1 and groups == module.in_channels
        kept = Use(path_of(n), "depthwise" if depthwise else "conv", x.layout, (), math.prod(module.kernel_size))
        if depthwise:
            kept.outputs = repeated(x.layout, outputs // groups)
        elif groups > 1:
            tie(x.layout, new(module.in_channels // groups) * groups)
            kept.outputs, kept.groups = new(outputs // groups) * groups, groups
        else:
            kept.outputs = new(outputs)
        return self._used(kept, x, Seen(tuple(result.shape), 1, kept.outputs), math.prod(result.shape[2:]))

    def _transposed(self, n: Node, module: Any, x: Seen, result: Tensor) -> Seen:
        if module.groups > 1:
            raise self.refused(n, f"{type(module).__name__} in groups has no rule")
        x = self.along(n, x, 1)
        kept = Use(path_of(n), "transposed", x.layout, new(module.out_channels), math.prod(module.kernel_size))
        return self._used(kept, x, Seen(tuple(result.shape), 1, kept.outputs), math.prod(x.shape[2:]))

    def _linear(self, n: Node, x: Seen, result: Tensor) -> Seen:
        x = self.along(n, x, len(x.shape) - 1)
        kept = Use(path_of(n), "linear", x.layout, new(result.shape[-1]))
        return self._used(
            kept, x, Seen(tuple(result.shape), result.ndim - 1, kept.outputs), math.prod(result.shape[1:-1])
        )

    def _norm(self, n: Node, module: nn.Module, x: Seen) -> Seen:
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return x
        if isinstance(module, nn.LayerNorm):
            if len(module.normalized_shape) != 1:
                fix(x.layout, f'"{path_of(n)}" normalises whole maps')
                return x
            x = self.along(n, x, len(x.shape) - 1)
        else:
            x = self.along(n, x, 1)
        if isinstance(module, nn.GroupNorm):
            tie(x.layout, new(x.shape[1] // module.num_groups) * module.num_groups)
        return self._used(Use(path_of(n), "norm", x.layout, x.layout), x, x, 0)

    def _used(self, kept: Use, x: Seen, result: Seen, positions: int) -> Seen:
        """The layer's first call, or another one that its widths must suit, too."""
        first = self.uses.setdefault(kept.name, kept)
        if first is not kept:
            tie(first.inputs, x.layout)
            if kept.kind not in ("depthwise", "norm"):  # of those outputs follow from inputs
                tie(first.outputs, kept.outputs)
        first.positions += positions
        return result


def _image(result: Any) -> Seen | None:
    if not isinstance(result, Tensor):
        return None
    return Seen(tuple(result.shape), 1, new(result.shape[1], fixed=True, why="it is the model's input"))


def _tensors(result: Any) -> bool:
    return isinstance(result, (tuple, list)) and bool(result) and all(isinstance(one, Tensor) for one in result)
