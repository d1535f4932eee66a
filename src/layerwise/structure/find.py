"""Find what a model is made of: `structure_of` fills the records of `parts.py` from any model."""

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import SelectionError
from .blocks import find_stacks
from .parts import Block, Layer, Stack, Structure
from .roles import role_in_block, role_outside
from .weights import kind_of, matrices_of

_NOT_BY_DEFAULT = {
    "router": "router: it decides which expert a token takes",
    "embedding": "embedding",
    "position": "position table",
    "norm": "norm",
    "parameter": "raw parameter whose use is not known",
}


def structure_of(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Structure:
    """Stacks, blocks and layers of `model`, and which layers are up for compression.

    By default all layers in blocks that multiply an input, routers left out. `include`: globs over the full names of all weights,
    also those in no block; exactly those that match are chosen. Norms, position tables and other raw parameters need a pattern that
    matches nothing else: "model.layers.0.*" leaves them alone, "*norm*" asks for them. `exclude` removes. Of tensors that are
    tied the first that is chosen stands for all. Raises SelectionError for a pattern that matches no weight.
    """
    stacks = find_stacks(model)
    block_of = {block: stack for stack, blocks in stacks for block in blocks}
    weights = list(_all_weights(model, block_of))
    refused = _refusals(weights, include, exclude)
    layers, left_out = _without_twins(weights, refused)
    return Structure(
        stacks=tuple(
            Stack(name, tuple(_block(block, name, index, layers) for index, block in enumerate(blocks)))
            for name, blocks in stacks
        ),
        outside=tuple(layer for layer in layers if layer.block is None),
        left_out=tuple(left_out),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fingerprint=_fingerprint(model),
    )


def _block(name: str, stack: str, index: int, layers: Sequence[Layer]) -> Block:
    return Block(name, stack, index, tuple(layer for layer in layers if layer.block == name))


def _all_weights(model: nn.Module, blocks: dict[str, str]) -> Iterator[Layer]:
    """Every weight of the model, in the order of its modules, tied ones once for each name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    head = _own_head(model)
    for path, module in model.named_modules():
        block = _holder(path, blocks)
        for own, parameter in module._parameters.items():
            if parameter is None or (kind := kind_of(module, own, parameter)) is None:
                continue
            full = f"{path}.{own}" if path else own
            name = path if own == "weight" and path else full
            matrices, rows, columns, transposed = matrices_of(module, own, parameter, kind, model)
            yield Layer(
                name=name,
                parameter=full,
                kind=kind,
                role=role_in_block(name, kind, modules, block) if block else role_outside(name, kind, modules, head),
                shape=tuple(parameter.shape),
                matrices=matrices,
                rows=rows,
                columns=columns,
                transposed=transposed,
                block=block,
                tied=tuple(other for other in names[id(parameter)] if other != full),
            )


def _own_head(model: nn.Module) -> nn.Module | None:
    """The head that a transformers model names itself."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not such a model, or one without a head
        return None
    return head if isinstance(head, nn.Module) else None


def _holder(path: str, blocks: dict[str, str]) -> str | None:
    """The block that the module at `path` is, or is part of."""
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return path or None


def _refusals(weights: Sequence[Layer], include: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """Parameter name -> why that weight is not up for compression, for those that are not."""
    if include:
        asked = {parameter for pattern in include for parameter in _matching(weights, pattern, careful=True)}
        refused = {layer.parameter: "not included" for layer in weights if layer.parameter not in asked}
    else:
        refused = {layer.parameter: reason for layer in weights if (reason := _reason_by_default(layer))}
    for pattern in exclude:
        for parameter in _matching(weights, pattern, careful=False):
            refused.setdefault(parameter, f'excluded by "{pattern}"')
    return refused


def _reason_by_default(layer: Layer) -> str | None:
    if layer.block is None:
        return "in no block"
    return _NOT_BY_DEFAULT.get(layer.role) or ("its module does not show its input" if layer.kind == "table" else None)


def _matching(weights: Sequence[Layer], pattern: str, *, careful: bool) -> set[str]:
    """Parameter names that a glob matches. careful: a pattern that matches other weights passes norms and tables by."""
    matched = [layer for layer in weights if fnmatchcase(layer.name, pattern) or fnmatchcase(layer.parameter, pattern)]
    if not matched:
        raise SelectionError(f'pattern "{pattern}" matches no weight of the model.{_hint(weights, pattern)}')
    plain = [layer for layer in matched if layer.kind != "table" and layer.role != "position"]
    return {layer.parameter for layer in (plain or matched if careful else matched)}


def _hint(weights: Sequence[Layer], pattern: str) -> str:
    names = [layer.name for layer in weights]
    if any(fnmatchcase(name, f"{pattern}.*") for name in names):
        return f' Did you mean "{pattern}.*"?'
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
    return f' The nearest name is "{near[0]}".' if near else " It has no weights that can be compressed."


def _without_twins(weights: Sequence[Layer], refused: dict[str, str]) -> tuple[list[Layer], list[tuple[Layer, str]]]:
    """Split into chosen layers, each tensor once, and those of blocks that stay as they are, with the reason."""
    chosen: list[Layer] = []
    left_out: list[tuple[Layer, str]] = []
    taken: dict[str, str] = {}
    for layer in weights:
        reason = refused.get(layer.parameter)
        if reason is None and not layer.size:
            reason = "it is empty"
        if reason is None and layer.parameter in taken:
            reason = f'tied to "{taken[layer.parameter]}"'
        if reason is None:
            chosen.append(layer)
            taken |= dict.fromkeys(layer.tied, layer.name)
        elif layer.block is not None and layer.role != "norm":
            left_out.append((layer, reason))
    return chosen, left_out


def _fingerprint(model: nn.Module) -> str:
    # every name of a tied tensor: a model built without its ties (on the meta device) has the same fingerprint
    lines = sorted(f"{name} {tuple(p.shape)}\n" for name, p in model.named_parameters(remove_duplicate=False))
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
