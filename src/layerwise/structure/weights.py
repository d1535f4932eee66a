"""Which parameters of a model are compressible weights, and how each is seen as matrices.

By the type of the module that owns the parameter and the parameter's shape; no table of models.
"""

import math
from collections.abc import Iterator

from torch import Tensor, nn

from ..errors import ModelError
from .parts import Kind

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts")
_READ_HIDDEN = ("gate", "up", "w1", "w3", "fc1", "wi")  # first names of experts that read the hidden state
_WRITE_HIDDEN = ("down", "w2", "fc2", "wo")
_HIDDEN = ("hidden_size", "hidden_dim", "dim", "d_model")


def kind_of(module: nn.Module, name: str, parameter: Tensor) -> Kind | None:
    """What `parameter`, called `name` in `module`, is; None for biases, packed integers and other vectors."""
    if not parameter.is_floating_point() or name.endswith("bias"):
        return None
    if name == "weight":
        # MultiheadAttention hands this weight to a function: its forward never runs and shows no input
        if type(module).__name__ == "NonDynamicallyQuantizableLinear":
            return "table"
        if isinstance(module, nn.Linear) or _looks_linear(module, parameter) or is_router(module):
            return "linear" if parameter.ndim == 2 else "table"
        if isinstance(module, _CONVOLUTIONS):
            return "conv"
        if type(module).__name__ == "Conv1D" and parameter.ndim == 2:
            return "conv1d"
        if isinstance(module, nn.Embedding):
            return "embedding"
    if parameter.ndim == 3 and _holds_experts(module, parameter):
        return "experts"
    return "table" if parameter.ndim > 1 or is_norm(module) else None


def weights_in(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path of the owner, owner, name in the owner, parameter) of all that multiplies an input, in the order of modules."""
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and kind_of(owner, name, parameter) not in (None, "embedding", "table"):
                yield path, owner, name, parameter


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation: LayerNorm, RMSNorm, BatchNorm2d, AdaLayerNormZero and the like."""
    return "norm" in type(module).__name__.lower()


def is_router(module: nn.Module) -> bool:
    """Whether this module owns the matrix that sends tokens to experts, by its class: Router, TopKGate."""
    name = type(module).__name__.lower()
    return name.endswith(("router", "gate")) and not any(True for _ in module.children())


def matrices_of(
    module: nn.Module, name: str, parameter: Tensor, kind: Kind, model: nn.Module
) -> tuple[int, int, int, bool]:
    """(matrices, rows, columns, transposed) of a weight. Raises ModelError if the order of an experts tensor is undecidable."""
    shape = tuple(parameter.shape)
    if kind == "conv1d":
        return 1, shape[1], shape[0], True
    if kind == "conv":
        groups = int(module.groups)  # type: ignore[arg-type]
        return groups, shape[0] // groups, math.prod(shape[1:]), False
    if kind == "experts":
        transposed = _experts_transposed(module, name, parameter, model)
        rows, columns = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        return shape[0], rows, columns, transposed
    return 1, math.prod(shape[:-1]), shape[-1], False


def _looks_linear(module: nn.Module, weight: Tensor) -> bool:
    """A linear by another library: it says how many features go in and out, and its weight has just that shape."""
    return tuple(weight.shape) == (getattr(module, "out_features", None), getattr(module, "in_features", None))


def _holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    counts = {getattr(module, name, None) for name in _EXPERT_COUNTS}
    return parameter.shape[0] in counts or "expert" in type(module).__name__.lower()


def _experts_transposed(module: nn.Module, name: str, parameter: Tensor, model: nn.Module) -> bool:
    """Whether experts are stored (expert, inputs, outputs), as gpt-oss and Llama 4 do, not (expert, outputs, inputs).

    Square weights do not show it; then another module of the same class in the model does.
    """
    verdict = _transposed_by_sizes(module, name, parameter, model)
    for other in model.modules():
        if verdict is None and type(other) is type(module) and (twin := other._parameters.get(name)) is not None:
            verdict = _transposed_by_sizes(other, name, twin, model)
    if verdict is None:
        raise ModelError(
            f'"{name}" of {type(module).__name__}, shape {tuple(parameter.shape)}: cannot tell which axis holds the inputs of the experts.'
            " Set module.is_transposed to True if it is stored (experts, inputs, outputs), to False if (experts, outputs, inputs)."
        )
    return verdict


def _transposed_by_sizes(module: nn.Module, name: str, parameter: Tensor, model: nn.Module) -> bool | None:
    """By the flag of transformers' experts decorator, stated sizes, a gated pair, or the hidden size; None if none of them tells.

    In a gated pair the halved width shows which axis is which.
    """
    flag = getattr(module, "is_transposed", None)
    if isinstance(flag, bool):
        return flag
    first, second = int(parameter.shape[1]), int(parameter.shape[2])
    for outputs, inputs in (("output_size", "input_size"), ("out_features", "in_features")):
        stated = getattr(module, outputs, None), getattr(module, inputs, None)
        if first != second and stated in ((first, second), (second, first)):
            return stated == (second, first)
    if (pair := _gated_pair_transposed(module)) is not None:
        return pair
    if not name.startswith(_READ_HIDDEN + _WRITE_HIDDEN):
        return None
    reads = name.startswith(_READ_HIDDEN)
    verdicts = {
        (first == hidden) is reads for hidden in _hidden_sizes(module, model) if (first == hidden) != (second == hidden)
    }
    return verdicts.pop() if len(verdicts) == 1 else None


def _gated_pair_transposed(module: nn.Module) -> bool | None:
    """From gate_up (2i wide) and down (i wide), whose other axes are both the hidden size; None without such a pair."""
    threes = {name: p.shape for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    fused = next((shape for name, shape in threes.items() if name.startswith("gate_up")), None)
    down = next((shape for name, shape in threes.items() if name.startswith("down")), None)
    if fused is None or down is None:
        return None
    if (down[1] * 2, down[2]) == (fused[2], fused[1]):
        return True
    return False if (down[1], down[2] * 2) == (fused[2], fused[1]) else None


def _hidden_sizes(module: nn.Module, model: nn.Module) -> set[int]:
    """What the module says of the hidden size, or its config, or else the config of the model."""
    config = getattr(model, "config", None)
    for holders in ((module, getattr(module, "config", None)), (config, getattr(config, "text_config", None))):
        sizes = {
            value for holder in holders for name in _HIDDEN if isinstance(value := getattr(holder, name, None), int)
        }
        if sizes:
            return sizes
    return set()
