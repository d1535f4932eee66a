"""Which modules of a model are its blocks: the outermost repeated residual units, found by repetition and type alone.

A container whose entries hold lists of blocks in their turn (the stages of a ResNet or Swin) is looked into; a list of experts, of
heads or of plain layers is not a stack.
"""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from .weights import is_norm, weights_in

_EXPERTS = ("experts", "expert")  # lists inside a block of which a token takes a few


def find_stacks(model: nn.Module) -> list[tuple[str, list[str]]]:
    """(name of the stack, names of its blocks) in the order of modules. Empty if nothing repeats."""
    # a block has several weights; units of one (convolution + norm + activation) count only where there is nothing better,
    # else the stem of a speech model would be taken for a stack
    for fewest in (2, 1):
        found: list[tuple[str, list[str]]] = []
        _search("", model, fewest, found, set())
        if found:
            return found
    return []


def _search(
    path: str, module: nn.Module, fewest: int, found: list[tuple[str, list[str]]], seen: set[nn.Module]
) -> None:
    if module in seen:
        return
    seen.add(module)
    blocks = _blocks_of(module, fewest) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    if blocks:
        found.append((path, [_join(path, name) for name in blocks]))
    for name, child in module.named_children():
        if name not in blocks and name not in _EXPERTS:
            _search(_join(path, name), child, fewest, found, seen)


def _blocks_of(container: nn.Module, fewest: int) -> list[str]:
    """Names of the entries of this list that are blocks; empty if it is no stack."""
    units = [(name, child) for name, child in container.named_children() if _is_unit(child, fewest)]
    if any(_is_stage(unit) for _, unit in units):
        return []
    size = sum(1 for _ in container.children())
    if size == 1:  # a model of one block: nothing repeats, so more is asked of its looks
        return [name for name, unit in units if fewest > 1 and _has_norm(unit)]
    if isinstance(container, nn.Sequential):  # may hold a stem and a head beside the blocks; they occur once
        classes = Counter(type(unit) for _, unit in units)
        units = [(name, unit) for name, unit in units if classes[type(unit)] > 1]
    if len(units) < 2 or not any(_has_norm(unit) or _returns_to_its_width(unit) for _, unit in units):
        return []
    return [name for name, _ in units]


def _is_unit(module: nn.Module, fewest: int) -> bool:
    """A module with a forward of its own over at least `fewest` weights that belong to its children."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(module).forward is nn.Module.forward:
        return False
    owners = [owner for path, owner, *_ in weights_in(module) if path]
    if len(owners) == 2 and all(hasattr(owner, "in_features") for owner in owners):
        # two linears that lead elsewhere are a head or a merger: there is no way round them for a residual
        return _returns_to_its_width(module)
    return len(owners) >= fewest


def _is_stage(unit: nn.Module) -> bool:
    """Whether most of this unit's parameters lie in lists of like residual units: then those are the blocks.

    Experts have no norm, the parts of a T5 block differ in class, and a list of attentions is the smaller part of its block.
    """
    inner = [module for list_ in _inner_lists(unit) for module in list_]
    return 2 * sum(_parameters(module) for module in inner) > _parameters(unit)


def _inner_lists(module: nn.Module) -> list[Sequence[nn.Module]]:
    """The outermost lists in this module, itself included, whose units are all of one class with a norm and several weights."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        units = [entry for entry in module.children() if _is_unit(entry, 2) and _has_norm(entry)]
        if units and len({type(unit) for unit in units}) == 1:
            return [units]
    return [units for name, child in module.named_children() if name not in _EXPERTS for units in _inner_lists(child)]


def _has_norm(module: nn.Module) -> bool:
    return any(is_norm(child) for child in module.modules())


def _returns_to_its_width(unit: nn.Module) -> bool:
    """Whether the last weight's outputs are as many as the first weight's inputs, as a residual connection needs."""
    owners = [owner for _, owner, *_ in weights_in(unit)]
    width = _feature_count(owners[0], "in")
    return width is not None and width == _feature_count(owners[-1], "out")


def _feature_count(owner: nn.Module, side: str) -> int | None:
    for name in (f"{side}_features", f"{side}_channels"):
        if isinstance(count := getattr(owner, name, None), int):
            return count
    return None


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
