"""Experts that a block holds in one weight (Mixtral, Qwen3-MoE, gpt-oss, Llama 4): packed one by one where readers take them so.

vLLM takes them one by one, as models are published. transformers 5.23 takes experts of a packed folder one by one only if they are
packed, all by one symmetric scheme, and fails on dense ones; those it takes in one weight, as it holds them. Of Llama 4 it builds each
expert as linears when a folder is packed, finds no weights for them and goes on with random ones.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..passes import store_of
from ..structure.weights import kind_of, matrices_of, weights_in
from .pack_quantized import Scheme
from .targets import Target, some_layers, unlike_experts
from .weights import check_file, weight_files

Parts = Mapping[str, slice]
"""Stored layer, as "model.layers.0.mlp.experts.0.gate_proj" -> its rows in the codes of the experts' parameter."""

REBUILT = ("Llama4TextExperts",)  # classes that transformers replaces when a folder is packed
DROPPED = "transformers 5.23 builds the experts of this model otherwise when a folder is packed, and leaves them random"
ONE_BY_ONE = "Experts are stored as vLLM takes them: transformers 5.23 cannot load them beside packed weights, layerwise.load can."
BY_BLOCK = "Experts are packed as vLLM takes them, unlike or beside zeros: transformers 5.23 cannot load that, layerwise.load can."
WITHOUT = "(--exclude '*.experts*')"
_PART = re.compile(r"(.*\.experts)\.\d+\.[^.]+")


def experts_of(model: nn.Module) -> tuple[str, ...]:
    """The parameters that hold several experts each."""
    return tuple(_experts_in(model))


def published(model: nn.Module) -> dict[str, Parts]:
    """Experts' parameter -> the linears that it is stored as, as the model is published; empty unless each expert is one by one there."""
    if store_of(model) is not None or not hasattr(model, "save_pretrained"):
        return {}
    found = {name: _parts(model, name, weight) for name, weight in _experts_in(model).items()}
    return found if all(found.values()) else {}


def pattern_of(parts: Parts) -> str:
    """The target of config.json for these: transformers finds the scheme of experts by a pattern alone."""
    match = _PART.fullmatch(next(iter(parts)))
    assert match is not None  # noqa: S101  (_parts)
    return rf"re:{re.escape(match[1])}\.\d+\..*"


def in_the_model(model: nn.Module, layers: Iterable[str]) -> tuple[str, ...]:
    """Layers of a packed folder by their names in the model: experts that are stored one by one are their parameter there."""
    whole = {part: name for name, parts in published(model).items() for part in parts}
    return tuple(dict.fromkeys(whole.get(layer, layer) for layer in layers))


def ignored_beside_linears(model: nn.Module, *, packed: bool = False) -> tuple[str, ...]:
    """Patterns for `ignore`: experts and routers, which are linears in engines, under names of their own, though not all are here.

    vLLM asks for "….experts.0.gate_proj" of any model with experts, Mixtral's w1 too, and raises if it is neither packed nor ignored.
    packed: whether the experts are.
    """
    routers, experts = r"re:.*\.(gate|router)$", r"re:.*\.experts\..*"
    if not experts_of(model):
        return ()
    return (routers,) if packed else (experts, routers)


def why_dense(model: nn.Module, planned: Mapping[str, Scheme | None], target: Target) -> str | None:
    """Why experts among these layers cannot be packed, and what to do instead; None if they can. None in place of a scheme: any may be."""
    if store_of(model) is not None:
        return f"experts of a streamed model are not packed. Load it whole (without --stream), or plan without them {WITHOUT}."
    if not published(model):
        return f"experts that are saved in one weight are not packed. Plan without them {WITHOUT}."
    every = experts_of(model)
    if without := [name for name in every if name not in planned]:
        return f"all experts are packed or none, and {some_layers(without)} would stay dense. Plan for all, or for none {WITHOUT}."
    known = {name: scheme for name in every if (scheme := planned[name]) is not None}
    return unlike_experts(known, target)


def left_dense(model: nn.Module, planned: Mapping[str, Scheme | None], target: Target) -> tuple[str, ...]:
    """What of these layers would be saved dense for the sake of experts, why, and what to do instead; a sentence for each reason.

    planned: the layers that get bits, each with its scheme where that is known.
    """
    experts = experts_of(model)
    asked = [layer for layer in planned if any(one == layer or one.startswith(f"{layer}.") for one in experts)]
    reasons = []
    if planned and target == "transformers" and rebuilt(model):
        reasons.append(f"nothing can be packed, since {DROPPED}. Take --for vllm.")
    if asked and (why := why_dense(model, planned, target)):
        reasons.append(f"{some_layers(asked)}: {why}")
    return tuple(reasons)


def check_experts(model: nn.Module, planned: Mapping[str, Scheme | None], target: Target) -> None:
    """Raise PlanError if an engine that was asked for by name would get layers dense that it should get packed."""
    if reasons := left_dense(model, planned, target):
        raise PlanError([f"{target}: {reason} Or leave --for out to have them saved dense." for reason in reasons])


def rebuilt(model: nn.Module) -> bool:
    """Whether transformers would build other experts for a packed folder of this model."""
    return any(type(module).__name__ in REBUILT for module in model.modules())


def unlike_in(model: nn.Module, folder: Path) -> bool:
    """Whether transformers cannot load the dense experts of this folder once it is packed."""
    stored = {tensor.name for file in weight_files(folder) for tensor in check_file(file)}
    return rebuilt(model) or not stored.issuperset(experts_of(model))


def _experts_in(model: nn.Module) -> dict[str, Tensor]:
    every = ((f"{path}.{name}", owner, name, weight) for path, owner, name, weight in weights_in(model))
    return {full: weight for full, owner, name, weight in every if kind_of(owner, name, weight) == "experts"}


def _parts(model: nn.Module, name: str, weight: Tensor) -> Parts:
    """What transformers would save of numbered rows in the place of this weight; empty unless these are linears."""
    from transformers.core_model_loading import revert_weight_conversion

    owner, _, own = name.rpartition(".")
    matrices, rows, _, transposed = matrices_of(model.get_submodule(owner), own, weight, "experts", model)
    if transposed:
        return {}
    numbers = torch.arange(matrices * rows).reshape(matrices, rows, 1)
    try:
        saved = revert_weight_conversion(model, {name: numbers})
    except Exception:  # the library's own code, on one weight where it may want several: then these are no linears
        return {}
    parts = {}
    for stored, part in saved.items():
        layer, first = stored.removesuffix(".weight"), int(part.flatten()[0])
        alone = torch.equal(part, torch.arange(first, first + len(part)).reshape(-1, 1))
        if layer == stored or not alone or not _PART.fullmatch(layer):
            return {}
        parts[layer] = slice(first, first + len(part))
    return parts
