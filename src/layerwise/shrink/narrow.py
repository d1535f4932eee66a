"""Transformers models whose layers have widths of their own: classes that build, save and load them.

`narrow(LlamaForCausalLM)` is the stock class with two differences: it is built from the config's dense sizes and then cut to the widths
that the config names, and it writes these into config.json. Decoders use transformers' own `per_layer_config` there (layer -> what
differs); models that this cannot say (several stacks, several MLPs in a block) name their groups under `layerwise_widths`. A stock class
refuses such a folder with an error, or builds it after `register()`. Widths that are the same in all blocks need none of this.
"""

import copy
import json
from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..structure import Coupling, Group, coupled_groups, structure_of
from .alike import CHANNELS, HEADS, KV_HEADS, alike, built, say
from .cut import cut_units

PER_LAYER, WIDTHS = "per_layer_config", "layerwise_widths"  # in config.json
GLOBAL_READS = "allow_global_per_layer_attribute_access"  # transformers' own: its configs check sizes that layers may say otherwise
REMOTE_MODULE = "modeling_layerwise"  # of a folder that brings its own code (`io.remote_code`)


def settle(model: nn.Module) -> None:
    """Let a model that was cut say its sizes: in its config where all blocks are alike and the stock class can be built so, else by
    becoming `narrow`. Models of other libraries stay as they are."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    stock = stock_class(model)
    now = coupled_groups(model)
    if widths_of(model, now) and (said := alike(model, stock, now)) is not None:
        say(model.config, said)
    forget_code(model.config)
    model.__class__ = narrow(stock) if widths_of(model, now) else stock  # type: ignore[arg-type]


def widths_of(model: nn.Module, coupling: Coupling | None = None) -> dict[str, int]:
    """Group -> units, of groups that are not as wide as the model's config says."""
    coupling = coupling or coupled_groups(model)
    dense = {group.name: group.units for group in coupled_groups(built(stock_class(model), model.config)).groups}
    return {group.name: group.units for group in coupling.groups if dense.get(group.name) != group.units}


def stock_class(model: nn.Module) -> type[Any]:
    """The class of transformers, also of a narrow model."""
    kind = type(model)
    return kind.__mro__[1] if "layerwise_narrow" in vars(kind) else kind


@cache
def narrow(architecture: type[Any]) -> type[Any]:
    """The class of this name whose layers have the widths that its config says. Its config is then that of the dense sizes."""
    if "layerwise_narrow" in vars(architecture):
        return architecture

    def __init__(self: Any, config: Any, *more: Any, **options: Any) -> None:  # noqa: N807
        plain, layers, groups = taken_apart(config)
        architecture.__init__(self, plain, *more, **options)
        if layers or groups:
            cut_to(self, layers, groups)

    def save_pretrained(self: Any, folder: Any, *more: Any, **options: Any) -> Any:
        found = architecture.save_pretrained(self, folder, *more, **options)
        write_widths(self, Path(folder))
        return found

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        # by the class of transformers: this one has its name, and no place to be found at
        found: Any = object.__reduce_ex__(self, max(2, protocol))
        return _empty, (architecture,), *found[2:]

    members = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "__reduce_ex__": __reduce_ex__,
        "layerwise_narrow": True,
    }
    return type(
        architecture.__name__,
        (architecture,),
        {**members, "__module__": architecture.__module__, "__doc__": architecture.__doc__},
    )


def _empty(architecture: type[Any]) -> Any:
    """A narrow model that a pickle or a copy is about to fill."""
    kind: Any = narrow(architecture)  # type: ignore[arg-type]
    return kind.__new__(kind)


def taken_apart(config: Any) -> tuple[Any, dict[int, dict[str, int]], dict[str, int]]:
    """A config's dense sizes, what it says of each layer, and what of groups."""
    groups = dict(getattr(config, WIDTHS, None) or {})
    if not groups and not getattr(config, "is_heterogeneous", False):
        return config, {}, {}
    plain = copy.deepcopy(config)
    forget_code(plain)
    layers: dict[int, dict[str, int]] = {}
    if getattr(config, "is_heterogeneous", False):
        layers = {int(index): dict(one) for index, one in (config.to_dict().get(PER_LAYER) or {}).items()}
        plain.per_layer_config = None
        plain.__dict__.pop(GLOBAL_READS, None)
    plain.__dict__.pop(WIDTHS, None)
    return plain, layers, groups


def forget_code(config: Any) -> None:
    """A modelling file of ours that the config points to: it stays behind in the folder that the model came from."""
    if any(REMOTE_MODULE in str(place) for place in (getattr(config, "auto_map", None) or {}).values()):
        del config.auto_map


def cut_to(model: nn.Module, layers: Mapping[int, Mapping[str, int]], groups: Mapping[str, int]) -> None:
    """Cut a dense model, whose weights are about to be read, to these widths. Raises ModelError for groups that it has not."""
    coupling = coupled_groups(model)
    wanted = dict(groups)
    if layers:
        for index, block in enumerate(structure_of(model).blocks):
            said = layers.get(index, {})
            for group in (one for one in coupling.groups if one.block == block.name):
                names = (KV_HEADS, HEADS) if group.kind == "heads" else CHANNELS
                units = next((said[name] for name in names if name in said), None)
                if units is not None:
                    wanted[group.name] = (
                        units if group.kind == "channels" or KV_HEADS in said else units // group.queries
                    )
    known = {group.name for group in coupling.groups}
    cut_units(model, {_own_name(model, name, known): range(units) for name, units in wanted.items()}, coupling)


def _own_name(model: nn.Module, name: str, names: Container[str]) -> str:
    """A group's name in a model that is what another one has within it (`AutoModel` of a language model's folder), or has it within."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in names), name)


def write_widths(model: nn.Module, folder: Path) -> None:
    """Put the widths of a model into the config.json that was written for it."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop(PER_LAYER, None)
    config.pop(WIDTHS, None)
    coupling = coupled_groups(model)
    if widths := widths_of(model, coupling):
        by_layer = _by_layer(model, coupling)
        said = by_layer is not None and _reads(model.config, {**config, PER_LAYER: by_layer})
        config |= {PER_LAYER: by_layer} if said else {WIDTHS: widths}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def said_by_layer(model: nn.Module) -> dict[str, dict[str, int]] | None:
    """What `per_layer_config` says of the model's layers; None where it cannot."""
    return _by_layer(model, coupled_groups(model))


def _reads(config: Any, written: dict[str, Any]) -> bool:
    """Whether the config's own class reads this: some check sizes that they no longer can when layers differ (GPT-NeoX)."""
    try:
        type(config).from_dict(written)
    except Exception:  # the class's own checks
        return False
    return True


def is_narrow(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names widths of layers."""
    return bool(config.get(PER_LAYER) or config.get(WIDTHS))


def register() -> None:
    """Let transformers' Auto classes build models with widths of each layer in this process:
    `AutoModelForCausalLM.from_pretrained(folder)` then does what `layerwise.load` does. Twice is as good as once."""
    import transformers

    for name in (one for one in dir(transformers) if one.startswith("AutoModel")):
        auto = getattr(transformers, name)
        if isinstance(table := getattr(auto, "_model_mapping", None), Mapping):
            auto._model_mapping = _Narrowing(table)


class _Narrowing:
    """A table of transformers from config classes to model classes, whose classes are narrow."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __getitem__(self, config: type) -> Any:
        found = self._table[config]
        return tuple(narrow(one) for one in found) if isinstance(found, (list, tuple)) else narrow(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def __contains__(self, config: object) -> bool:
        return config in self._table

    def __iter__(self) -> Any:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def _by_layer(model: nn.Module, coupling: Coupling) -> dict[str, dict[str, int]] | None:
    """Layer -> names of the config and their values, of what differs; None where a config cannot say it layer by layer."""
    structure, config = structure_of(model), model.config
    if len(structure.stacks) != 1 or getattr(config, "num_hidden_layers", None) != len(structure.blocks):
        return None
    dense = {group.name: group for group in coupled_groups(built(stock_class(model), config)).groups}
    found: dict[str, dict[str, int]] = {}
    for index, block in enumerate(structure.blocks):
        own = [group for group in coupling.groups if group.block == block.name]
        if len({group.kind for group in own}) < len(own):
            return None
        for group in own:
            if group.units == dense[group.name].units:
                continue
            names = _names(config, dense[group.name], group)
            if names is None:
                return None
            found.setdefault(str(index), {}).update(names)
    return found


def _names(config: Any, dense: Group, group: Group) -> dict[str, int] | None:
    if group.kind == "channels":
        name = next((one for one in CHANNELS if getattr(config, one, None) == dense.units), None)
        return None if name is None else {name: group.units}
    if getattr(config, HEADS, None) != dense.heads:
        return None
    names = {HEADS: group.heads}
    if getattr(config, KV_HEADS, None) is not None:
        names[KV_HEADS] = group.units
    elif group.queries != 1:
        return None
    return names
