"""Dropping whole blocks: the residual stream passes by, what counts blocks counts again, and the stock class loads what is saved."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from ..structure import Stack, shares_keys, structure_of
from .narrow import settle, stock_class, widths_of

_COUNTS = ("num_hidden_layers", "num_layers", "encoder_layers", "num_decoder_layers", "decoder_layers", "depth")
_BY_INDEX = ("mlp_only_layers", "moe_layers")  # lists of the blocks that are of a kind


def drop_blocks(model: nn.Module, names: Sequence[str]) -> None:
    """Remove these blocks, in place. Cache indices (`layer_idx`) are renumbered, the config counts anew, and its lists of one entry a block
    (`layer_types`) lose theirs.

    Raises ModelError for a block that is not there, ConfigError for a stack of which none would be left, ModelError where the stock class
    could not be built so (a block that holds what others use, T5's position bias) or blocks read keys of others; nothing has changed then.
    """
    for place, (stack, kept, config) in enumerate(check_drops(model, names)):
        _drop(model, stack, kept, config if place == 0 else _counted(model, stack, kept))
    if "layerwise_narrow" in vars(type(model)):  # the blocks that are left may be alike
        settle(model)


def can_drop(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether the model can be built without these blocks: a T5 cannot without a first block, which holds its position biases."""
    try:
        check_drops(model, names)
    except ModelError:
        return False
    return True


def check_drops(model: nn.Module, names: Sequence[str]) -> list[tuple[Stack, list[int], Any]]:
    """For each stack that loses blocks: which stay, and the config that then says so (None without one). Raises as `drop_blocks`."""
    stacks = structure_of(model).stacks
    known = {block.name for stack in stacks for block in stack.blocks}
    if odd := [name for name in names if name not in known]:
        first = next((block.name for stack in stacks for block in stack.blocks), "none")
        raise ModelError(f'"{odd[0]}": the model has no such block. Its first is "{first}".')
    left = [(stack, [block.index for block in stack.blocks if block.name not in {*names}]) for stack in stacks]
    for stack, kept in left:
        if not kept:
            raise ConfigError(
                f'"{stack.name}": all of its {len(stack.blocks)} blocks were to be dropped. Keep at least one.'
            )
    return [(stack, kept, _counted(model, stack, kept)) for stack, kept in left if len(kept) < len(stack.blocks)]


def _counted(model: nn.Module, stack: Stack, kept: Sequence[int]) -> Any:
    blocks = model.get_submodule(stack.name)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) != len(stack.blocks):
        raise ModelError(f'"{stack.name}" is no plain list of blocks: they cannot be dropped.')
    if shares_keys(blocks):
        raise ModelError(
            f'"{stack.name}": its last blocks read the keys and values of earlier ones, and which is set when the model is built. Keep all.'
        )
    return _recounted(model, stack, kept) if hasattr(model, "config") else None


def _drop(model: nn.Module, stack: Stack, kept: Sequence[int], config: Any) -> None:
    blocks: Any = model.get_submodule(stack.name)
    for index in reversed(range(len(blocks))):
        if index not in kept:
            del blocks[index]
    for place, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = place
    if config is not None:
        _take_on(model.config, config)


def _recounted(model: nn.Module, stack: Stack, kept: Sequence[int]) -> Any:
    """The config of the model without these blocks: the first way to count for which its class has the parameters that are left."""
    renamed = {f"{stack.name}.{old}.": f"{stack.name}.{new}." for new, old in enumerate(kept)}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{stack.name}."):
            wanted[name] = tuple(parameter.shape)
            continue
        before = next((old for old in renamed if name.startswith(old)), None)
        if before is not None:
            wanted[renamed[before] + name.removeprefix(before)] = tuple(parameter.shape)
    narrow = "layerwise_narrow" in vars(type(model)) and bool(widths_of(model))  # then names must do
    for config in _candidates(model.config, len(stack.blocks), kept):
        shapes = _shapes(stock_class(model), config)
        if shapes == wanted or (narrow and shapes.keys() == wanted.keys()):
            return config
    raise ModelError(
        f'"{stack.name}": {type(model).__name__} cannot be built without these blocks (they may hold what others use, as a first block'
        " with position biases does). Keep them."
    )


def _shapes(stock: type[Any], config: Any) -> dict[str, tuple[int, ...]]:
    """Of the parameters of a model of this config; none where the class refuses it."""
    try:
        with torch.device("meta"):
            built = stock(copy.deepcopy(config))
    except Exception:  # the class's own checks
        return {}
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}


def _candidates(config: Any, count: int, kept: Sequence[int]) -> Iterator[Any]:
    """Configs with one number of `count` blocks changed, each with its lists shortened."""
    for path in ("", "text_config", "vision_config"):
        for name in _COUNTS:
            own = getattr(config, path, None) if path else config
            if own is None or getattr(own, name, None) != count:
                continue
            changed = copy.deepcopy(config)
            part = getattr(changed, path) if path else changed
            _shorten(part, count, kept)
            setattr(part, name, len(kept))
            yield changed


def _shorten(config: Any, count: int, kept: Sequence[int]) -> None:
    place = {old: new for new, old in enumerate(kept)}
    for name, value in vars(config).items():
        if name in _BY_INDEX and isinstance(value, list):
            setattr(config, name, [place[index] for index in value if index in place])
        elif isinstance(value, (list, tuple)) and len(value) == count and not name.startswith("_"):
            setattr(config, name, [value[index] for index in kept])


def _take_on(config: Any, changed: Any) -> None:
    """In place: modules share the config."""
    for name, value in vars(changed).items():
        mine = vars(config).get(name)
        if hasattr(value, "to_dict") and hasattr(mine, "to_dict"):
            _take_on(mine, value)
        else:
            vars(config)[name] = value
