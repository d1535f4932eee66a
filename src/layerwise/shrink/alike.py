"""Widths that are the same in all blocks of a stack, said by the config that the stock class is built from.

Configs name sizes in many ways: one name for both stacks (T5), a name for each (Whisper), a config within the config for each (CLIP),
nothing for what is four times the hidden size (GPT-2). So each way is tried, and holds where the stock class then has the shapes.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..structure import Coupling, Group, coupled_groups, structure_of

CHANNELS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")
HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
_CHANNELS_OF_STACKS = ("encoder_ffn_dim", "decoder_ffn_dim")
Said = dict[tuple[str, ...], int]  # path of names in the config -> value


def alike(model: nn.Module, stock: type[Any], coupling: Coupling) -> Said | None:
    """What the config must say for the stock class to be built as the model is; None where blocks of a stack differ, or it cannot."""
    dense = {group.name: group for group in coupled_groups(built(stock, model.config)).groups}
    said: Said = {}
    for groups in _places(model, coupling):
        sizes = {(group.units, dense[group.name].units) for group in groups}
        if all(now == before for now, before in sizes):
            continue
        if len(sizes) > 1:
            return None
        names = [part.parameter for group in groups for part in group.parts]
        ways = ({**said, **way} for way in _ways(model.config, dense[groups[0].name], groups[0]))
        fits = next((way for way in ways if _shapes(stock, model, way, names) == _shapes_of(model, names)), None)
        if fits is None:
            return None
        said = fits
    return said if _shapes(stock, model, said) == _shapes_of(model) else None


def say(config: Any, said: Said) -> None:
    """Put it into the config, in place: modules hold it, too."""
    for (*path, name), value in said.items():
        own = config
        for step in path:
            own = getattr(own, step)
        setattr(own, name, value)


def built(stock: type[Any], config: Any) -> nn.Module:
    """A model of this config without memory."""
    with torch.device("meta"), contextlib.suppress(AttributeError):
        return stock(copy.deepcopy(config))  # type: ignore[no-any-return]
    raise TypeError(stock)  # pragma: no cover


def _places(model: nn.Module, coupling: Coupling) -> list[list[Group]]:
    """Groups that lie in one place of the blocks of a stack."""
    stacks = {block.name: stack.name for stack in structure_of(model).stacks for block in stack.blocks}
    found: dict[tuple[str, str, str], list[Group]] = {}
    for group in coupling.groups:
        place = (stacks[group.block], group.kind, group.name.removeprefix(group.block))
        found.setdefault(place, []).append(group)
    return list(found.values())


def _ways(config: Any, dense: Group, group: Group) -> Iterator[Said]:
    """What could be said of a group that was `dense`."""
    for path, own in _configs(config):
        if group.kind == "channels":
            for name in (*CHANNELS, *_CHANNELS_OF_STACKS):
                if hasattr(own, name) and getattr(own, name) in (dense.units, None):
                    yield {(*path, name): group.units}
        elif getattr(own, HEADS, None) == dense.heads:
            kv_heads = getattr(own, KV_HEADS, None) is not None
            if (
                kv_heads or group.queries == 1
            ):  # a size of heads that is no name of the config is read all the same (Qwen2)
                yield {
                    (*path, HEADS): group.heads,
                    **({(*path, KV_HEADS): group.units} if kv_heads else {}),
                    (*path, "head_dim"): group.head_dim,
                }


def _configs(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The config and those within it, by their paths."""
    yield (), config
    for name, own in vars(config).items():
        if hasattr(own, "to_dict"):
            yield from (((name, *path), one) for path, one in _configs(own))


def _shapes(
    stock: type[Any], model: nn.Module, said: Said, names: Iterable[str] | None = None
) -> dict[str, Any] | None:
    """Of the stock class with this in its config; None where it is not built so."""
    try:
        config = copy.deepcopy(model.config)
        say(config, said)
        return _shapes_of(built(stock, config), names)
    except Exception:  # the class's own checks
        return None


def _shapes_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Any]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes if names is None else {name: shapes[name] for name in names}
