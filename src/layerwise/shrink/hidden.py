"""Cutting the residual stream itself: one set of channels for the whole model, since every block adds to what the others read.

Embedding, every reader and writer in every block, norms and head lose the same entries. A root-mean-square norm divides by its width,
which is smaller now: its gain is multiplied by sqrt(d / n) and its epsilon by d / n, so that removing a channel equals keeping it at
zero, exactly but for rounding. Models that norm queries and keys have one epsilon in their config for all norms: it stays as it is there,
which is exact to its own size beside the mean square. Norms that subtract a mean have no such form, and embeddings scaled by their width
(Gemma) would change with it: refused.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..structure import Layer, structure_of
from ..structure.coupled import Part
from .cut import _cut

_READS = "q k v qkv gate up gate_up fc1 router head".split()
_WRITES = "o down fc2".split()
_EPSILONS = ("variance_epsilon", "eps")
_CONFIG_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


def hidden_parts(model: nn.Module) -> list[Part]:
    """Everything that is as wide as the residual stream of a decoder; units are its channels, "out" are those that write it.

    Raises ModelError for models whose stream cannot be cut exactly: no single stack, norms that subtract a mean, weights of unknown role.
    """
    structure, width = structure_of(model, include=["*"]), _width(model)
    if len(structure.stacks) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(structure.stacks)} stacks of blocks; the hidden size of one can be cut."
        )
    known: dict[str, Part] = {}
    for layer in structure.layers:
        for part in _parts_of(model, layer, width):
            known[part.parameter] = part
    for name, parameter in model.named_parameters():
        if (
            parameter.ndim == 1
            and name not in known
            and parameter.shape[0] == width
            and "norm" in name.rpartition(".")[0].lower()
        ):
            known[name] = Part(name, 0, _each(width), "out", scored=False)
    left = [
        name
        for name, parameter in model.named_parameters()
        if name not in known and width in parameter.shape and parameter.ndim > 1
    ]
    if left:
        raise ModelError(f'"{left[0]}": what it does with the hidden size of {type(model).__name__} is not known.')
    return list(known.values())


def cut_hidden(model: nn.Module, keep: Sequence[int]) -> None:
    """Keep these channels of the residual stream, in place; the config says the new size, and the stock class loads what is saved.

    Raises ConfigError for channels that are not there or none, ModelError as `hidden_parts`; nothing has changed then.
    """
    width = _width(model)
    kept = sorted(int(one) for one in keep)
    if not kept or len({*kept}) < len(kept) or kept[0] < 0 or kept[-1] >= width:
        raise ConfigError(f"the hidden size is {width}: keep some of the channels 0 to {width - 1}, each once.")
    parts = hidden_parts(model)
    norms = _norms(model, width)
    if len(kept) == width:
        return
    _check_config(model, len(kept), width)
    with torch.no_grad():
        for norm, _ in norms:
            norm.weight.mul_(math.sqrt(width / len(kept)))  # type: ignore[operator]
    entries = torch.tensor(kept, device="cpu")
    shared = _tied_names(model)
    for part in parts:
        _cut(model, part.parameter, part.dim, entries)
        for other in shared.get(part.parameter, ()):
            path, _, own = other.rpartition(".")
            model.get_submodule(path)._parameters[own] = model.get_parameter(part.parameter)
    _say(model, norms, width, len(kept))


def _check_config(model: nn.Module, kept: int, width: int) -> None:
    """Raise ConfigError where the config's own class refuses the size (Llama wants a multiple of its heads)."""
    config: Any = model.config
    try:
        type(config).from_dict({**config.to_dict(), "hidden_size": kept, "head_dim": _head_dim(config, width)})
    except Exception as error:  # the class's own checks
        line = next((one for one in reversed(str(error).splitlines()) if one.strip()), "")
        raise ConfigError(f"a hidden size of {kept} is refused by {type(config).__name__}: {line.strip()}") from error


def _head_dim(config: Any, width: int) -> int:
    return int(getattr(config, "head_dim", None) or width // config.num_attention_heads)


def _say(model: nn.Module, norms: list[tuple[nn.Module, str]], width: int, kept: int) -> None:
    """Sizes and epsilons, where modules and the config keep them."""
    config: Any = model.config
    config.head_dim = _head_dim(config, width)
    alone = not _others(model, norms)
    for norm, name in norms:
        if alone:
            setattr(norm, name, getattr(norm, name) * width / kept)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (kept,)  # type: ignore[assignment]
    for name in _CONFIG_EPSILONS:
        if alone and isinstance(getattr(config, name, None), float):
            setattr(config, name, getattr(config, name) * width / kept)
    config.hidden_size = kept
    for module in model.modules():
        for own in ("hidden_size", "hidden_dim"):
            if module.__dict__.get(own) == width:
                setattr(module, own, kept)
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            module.embedding_dim = kept
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _parts_of(model: nn.Module, layer: Layer, width: int) -> list[Part]:
    rows, columns = (
        (len(layer.shape) - 1, len(layer.shape) - 2)
        if layer.transposed
        else (len(layer.shape) - 2, len(layer.shape) - 1)
    )
    if layer.kind == "embedding" and layer.shape[-1] == width:
        return [Part(layer.parameter, layer.shape.index(width, 1), _each(width), "out")]
    role = layer.role.removeprefix("cross_")
    if role in _READS and layer.columns == width:
        return [Part(layer.parameter, columns, _each(width), "in")]
    if role in _WRITES and layer.rows == width:
        owner, _, own = layer.parameter.rpartition(".")
        names = {name for name, _ in model.get_submodule(owner).named_parameters(recurse=False)}
        bias = next((f"{owner}.{one}" for one in ("bias", f"{own}_bias") if one in names and one != own), None)
        found = [Part(layer.parameter, rows, _each(width), "out")]
        if bias is not None:
            found.append(Part(bias, model.get_parameter(bias).ndim - 1, _each(width), "out", scored=False))
        return found
    return []


def _norms(model: nn.Module, width: int) -> list[tuple[nn.Module, str]]:
    """The norms of the stream, with the name of their epsilon. Raises ModelError for one that is not weight * x / rms(x)."""
    found = []
    draw = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 1 or len(weight) != width or "norm" not in name.lower():
            continue
        epsilon = next((one for one in _EPSILONS if isinstance(getattr(module, one, None), float)), None)
        inputs = torch.randn(2, width, generator=draw).to(weight)
        with torch.no_grad():
            got = module(inputs)
            expected = (
                weight
                * inputs
                * torch.rsqrt(inputs.float().square().mean(-1, keepdim=True) + getattr(module, epsilon or "", 0.0))
            )
        if (
            epsilon is None
            or not isinstance(got, Tensor)
            or not torch.allclose(got.float(), expected.float(), rtol=2e-2, atol=1e-2)
        ):
            raise ModelError(
                f'"{name}" ({type(module).__name__}) is no plain root-mean-square norm: the hidden size cannot be cut exactly.'
            )
        found.append((module, epsilon))
    if not found:
        raise ModelError(f"{type(model).__name__} has no norms of its hidden size: it cannot be cut exactly.")
    return found


def _others(model: nn.Module, norms: list[tuple[nn.Module, str]]) -> bool:
    """Whether there are norms of anything else, whose epsilon the config has in the same place."""
    own = {id(norm) for norm, _ in norms}
    return any(
        any(isinstance(getattr(module, one, None), float) for one in _EPSILONS) and id(module) not in own
        for module in model.modules()
    )


def _width(model: nn.Module) -> int:
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ModelError(f"{type(model).__name__} has no hidden size in its config.")
    return width


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Parameter -> its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {one: [other for other in every if other != one] for every in names.values() for one in every}


def _each(width: int) -> Tensor:
    return torch.arange(width, device="cpu").unsqueeze(1)
