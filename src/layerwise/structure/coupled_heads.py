"""Attention heads: a key/value head with the query heads that read it, of the forms that are known to run at any number of heads.

Hugging Face repeats each key/value head consecutively: query head a reads head floor(a / r), r query heads to each. Nothing is cut inside a
head, since rotary positions pair its entries. Norms of queries and keys that are as long as a head are shared by all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .coupled import Group, Part, _dim, _rows
from .parts import Block, Layer

# beside modules with `head_dim` and `num_key_value_groups`, which all views of heads are made from (Llama and what follows it)
_SEPARATE = (
    "OPTAttention CLIPAttention SiglipAttention ViTAttention DeiTAttention BertSelfAttention RobertaSelfAttention"
    " WhisperAttention BartAttention"
).split()
_ONE_WEIGHT = {
    "GPT2Attention": "one behind the other",
    "Phi3Attention": "one behind the other",
    "GPTNeoXAttention": "by head",
}
_SIZES = ("head_dim", "attention_head_size", "head_size")


def heads_of(model: nn.Module, block: Block, name: str, layers: Sequence[Layer]) -> Group | str | None:
    """The heads of an attention; why it is left whole; None for what is none."""
    roles = {
        layer.role.removeprefix("cross_"): layer
        for layer in layers
        if layer.role.removeprefix("cross_") in "q k v qkv o".split()
    }
    if not roles.keys() & {"q", "qkv"}:
        return None
    module = model.get_submodule(name)
    kind, size = type(module).__name__, next((getattr(module, one) for one in _SIZES if hasattr(module, one)), 0)
    if "o" not in roles or not size:
        return f"the heads of {kind} are of no known form"
    if "qkv" in roles:
        return _in_one(model, block, name, roles["qkv"], roles["o"], kind, size)
    known = kind in _SEPARATE or hasattr(module, "num_key_value_groups")
    if not known or not {"q", "k", "v"} <= roles.keys():
        return f"the heads of {kind} are of no known form"
    q, k, v, o = (roles[role] for role in "qkvo")
    heads, units = q.rows // size, k.rows // size
    if any(layer.rows % size for layer in (q, k, v)) or v.rows != k.rows or o.columns != q.rows or heads % units:
        return f"{q.rows} rows of q, {k.rows} of k, {v.rows} of v and {o.columns} columns of o make no whole heads of {size}"
    queries = heads // units
    wide, narrow = _blocks(units, queries * size), _blocks(units, size)
    parts = [*_rows(model, q, wide), *_rows(model, k, narrow), *_rows(model, v, narrow)]
    parts.append(Part(o.parameter, _dim(o, "in"), wide, "in"))
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.shape == (heads,):  # one number a head: sinks
            parts.append(Part(f"{name}.{own}", 0, _blocks(units, queries), "out", scored=False))
    for own, parameter in module.named_parameters():
        if "norm" in own and parameter.shape[-1] not in (size,):
            return f'"{name}.{own}" normalises over all heads'
    return Group(name, "heads", units, tuple(parts), block.name, size, queries)


def _in_one(model: nn.Module, block: Block, name: str, qkv: Layer, o: Layer, kind: str, size: int) -> Group | str:
    """Queries, keys and values in one weight."""
    if kind not in _ONE_WEIGHT:
        return f"{kind} is in no table of how q, k and v lie in one weight"
    heads = o.columns // size
    units = (qkv.rows // size - heads) // 2
    if units < 1 or heads % units or (heads + 2 * units) * size != qkv.rows:
        return f"{qkv.rows} rows of q, k and v make no whole heads of {size}"
    queries = heads // units
    if _ONE_WEIGHT[kind] == "by head":
        index = _blocks(units, 3 * size)
    else:
        q, k = _blocks(units, queries * size), _blocks(units, size)
        index = torch.cat([q, heads * size + k, (heads + units) * size + k], dim=1)
    parts = [*_rows(model, qkv, index), Part(o.parameter, _dim(o, "in"), _blocks(units, queries * size), "in")]
    return Group(name, "heads", units, tuple(parts), block.name, size, queries)


def _blocks(units: int, entries: int) -> Tensor:
    """(units, entries): consecutive entries for each unit."""
    return torch.arange(units * entries, device="cpu").view(units, entries)
