"""Experts that a block holds in one weight (Mixtral, Qwen3-MoE, gpt-oss, Llama 4): dense in a packed folder, as its reader takes them.

vLLM takes them one by one, as models are published. transformers 5.23 takes experts of a packed folder one by one only if they are
packed, and fails on dense ones; those it takes in one weight, as it holds them. Of Llama 4 it builds each expert as linears when a folder
is packed, finds no weights for them and goes on with random ones.
"""

from collections.abc import Collection
from pathlib import Path

from torch import nn

from ..errors import PlanError
from ..structure.weights import kind_of, weights_in
from .targets import Target, some_layers
from .weights import check_file, weight_files

REBUILT = ("Llama4TextExperts",)  # classes that transformers replaces when a folder is packed
DROPPED = "transformers 5.23 builds the experts of this model otherwise when a folder is packed, and leaves them random"
ONE_BY_ONE = "Experts are stored as vLLM takes them: transformers 5.23 cannot load them beside packed weights, layerwise.load can."


def experts_of(model: nn.Module) -> tuple[str, ...]:
    """The parameters that hold several experts each."""
    every = ((f"{path}.{name}", kind_of(owner, name, weight)) for path, owner, name, weight in weights_in(model))
    return tuple(name for name, kind in every if kind == "experts")


def ignored_beside_linears(model: nn.Module) -> tuple[str, ...]:
    """Patterns for `ignore`: experts and routers, which are linears in engines, under names of their own, though not all are here.

    vLLM asks for "….experts.0.gate_proj" of any model with experts, Mixtral's w1 too, and raises if it is neither packed nor ignored.
    """
    return (r"re:.*\.experts\..*", r"re:.*\.(gate|router)$") if experts_of(model) else ()


def left_dense(model: nn.Module, layers: Collection[str], target: Target) -> tuple[str, ...]:
    """What of these layers would be saved dense for the sake of experts, why, and what to do instead; a sentence for each reason."""
    experts = experts_of(model)
    asked = [layer for layer in layers if any(one == layer or one.startswith(f"{layer}.") for one in experts)]
    reasons = []
    if layers and target == "transformers" and rebuilt(model):
        reasons.append(f"nothing can be packed, since {DROPPED}. Take --for vllm.")
    if asked:
        reasons.append(
            f"{some_layers(asked)}: experts in one weight are not packed. Plan without them (--exclude '*.experts*')."
        )
    return tuple(reasons)


def check_experts(model: nn.Module, layers: Collection[str], target: Target) -> None:
    """Raise PlanError if an engine that was asked for by name would get layers dense that it should get packed."""
    if reasons := left_dense(model, layers, target):
        raise PlanError([f"{target}: {reason} Or leave --for out to have them saved dense." for reason in reasons])


def rebuilt(model: nn.Module) -> bool:
    """Whether transformers would build other experts for a packed folder of this model."""
    return any(type(module).__name__ in REBUILT for module in model.modules())


def unlike_in(model: nn.Module, folder: Path) -> bool:
    """Whether transformers cannot load the dense experts of this folder once it is packed."""
    stored = {tensor.name for file in weight_files(folder) for tensor in check_file(file)}
    return rebuilt(model) or not stored.issuperset(experts_of(model))
