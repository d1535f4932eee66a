"""Attention heads: a key/value head with the query heads that read it, of the forms that are known to run at any number of heads.

Hugging Face repeats each key/value head consecutively: query head a reads head floor(a / r), r query heads to each. Nothing is cut inside a
head, since rotary positions pair its entries. Norms of queries and keys that are as long as a head are shared by all of them. An attention
is offered only where every parameter in it is one of these: what else a head may own would stay behind, and be read by others.
"""

import inspect
from collections.abc import Mapping, Sequence

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
_COUNTS = ("num_attention_heads", "num_key_value_heads")
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
        found = _in_one(model, block, name, roles["qkv"], roles["o"], kind, size)
    elif {"q", "k", "v"} <= roles.keys() and (kind in _SEPARATE or hasattr(module, "num_key_value_groups")):
        if _asks_config(module):
            return f"{kind} reads the number of its heads in the config of the whole model"
        found = _separate(model, block, name, roles, size)
    else:
        return f"the heads of {kind} are of no known form"
    return _unknown_in(module, found, roles["o"]) or found if isinstance(found, Group) else found


def _separate(model: nn.Module, block: Block, name: str, roles: Mapping[str, Layer], size: int) -> Group | str:
    """Queries, keys and values in a weight each."""
    q, k, v, o = (roles[role] for role in "qkvo")
    heads, units = q.rows // size, k.rows // size
    if any(layer.rows % size for layer in (q, k, v)) or v.rows != k.rows or o.columns != q.rows or heads % units:
        return f"{q.rows} rows of q, {k.rows} of k, {v.rows} of v and {o.columns} columns of o make no whole heads of {size}"
    queries = heads // units
    wide, narrow = _blocks(units, queries * size), _blocks(units, size)
    parts = [*_rows(model, q, wide), *_rows(model, k, narrow), *_rows(model, v, narrow)]
    parts.append(Part(o.parameter, _dim(o, "in"), wide, "in"))
    sinks = model.get_submodule(name)._parameters.get("sinks")
    if sinks is not None and sinks.shape == (heads,):  # one number a query head
        parts.append(Part(f"{name}.sinks", 0, _blocks(units, queries), "out", scored=False))
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


def _unknown_in(module: nn.Module, group: Group, o: Layer) -> str | None:
    """Why an attention with a parameter that is neither cut with its heads nor shared by all of them is left whole."""
    known = {part.parameter for part in group.parts} | {o.parameter.rpartition(".")[0] + ".bias"}
    for own, parameter in module.named_parameters():
        if f"{group.name}.{own}" in known:
            continue
        norm = "norm" in own
        if norm and parameter.shape[-1] != group.head_dim:
            return f'"{group.name}.{own}" normalises over all heads'
        if not norm or parameter.ndim != 1 or own.count(".") > 1:  # a list of norms has one for each head
            return f'the heads of {type(module).__name__} are of no known form: how they share "{own}" is in no table'
    return None


def _asks_config(module: nn.Module) -> bool:
    """Whether its forward pass reads how many heads there are and the module has no such number itself."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and any(count in code.co_names and not hasattr(module, count) for count in _COUNTS)


def shares_keys(stack: nn.Module) -> bool:
    """Whether blocks of this stack read keys and values that others of it made (Gemma 3n, Gemma 4)."""
    return any(
        vars(one).get(flag) for one in stack.modules() for flag in ("is_kv_shared_layer", "store_full_length_kv")
    )


def _blocks(units: int, entries: int) -> Tensor:
    """(units, entries): consecutive entries for each unit."""
    return torch.arange(units * entries, device="cpu").view(units, entries)
