"""What a layer does, from the names along its path. One small table of the names that architectures share."""

from collections.abc import Sequence

from torch import nn

from .parts import Kind
from .weights import is_norm, is_router

_ROLES = {
    "q": "q_proj q query to_q wq q_lin q_b_proj query_proj linear_q",
    "k": "k_proj k key to_k wk k_lin key_proj linear_k",
    "v": "v_proj v value to_v wv v_lin value_proj linear_v",
    "qkv": "qkv qkv_proj c_attn query_key_value wqkv to_qkv in_proj_weight att_proj",
    "o": "o_proj o out_proj to_out out_lin attn_out linear_out",
    "gate": "gate_proj wi_0 w1 gate",
    "up": "up_proj wi_1 w3",
    "gate_up": "gate_up_proj input_linear",
    "down": "down_proj w2 output_linear",
    "fc1": "fc1 c_fc dense_h_to_4h wi linear1 lin1 linear_fc1 pwconv1 fc_in proj_mlp dense1 intermediate_dense",
    "fc2": "fc2 dense_4h_to_h linear2 lin2 linear_fc2 pwconv2 fc_out proj_out dense2 output_dense ffn_output",
    "context_q": "add_q_proj",
    "context_k": "add_k_proj",
    "context_v": "add_v_proj",
    "context_o": "to_add_out",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_ATTENTION = ("attn", "attention")  # parts of the names of attention modules
_CROSS = ("cross", "encdec", "encoder_attn")
# the last linear of attention and of MLPs alike
_AT_THE_END = ("dense", "c_proj", "proj", "projection", "projection_layer", "wo", "output")
_SEQUENCES = ("net", "ff", "ffn", "mlp", "feed_forward")  # an MLP as a list: its first weight goes up, the others down
_WRAPPERS = ("linear", "base_layer", "convolution")  # names of the weight inside a module that has the telling name
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
_SHORTCUTS = ("shortcut", "downsample", "skip")
_HEADS = ("lm_head", "head", "classifier", "score", "fc", "embed_out", "output_projection", "decoder", "proj_out")
_POSITIONS = ("pos_", "position", "relative_", "wpe")


def role_in_block(path: str, kind: Kind, modules: dict[str, nn.Module], block: str) -> str:
    """Role of the weight at full `path` inside `block`, e.g. "q", "cross_k", "down"; its own name where the table has none.

    modules: path -> module of the model, also of modules reached by several paths.
    """
    if role := _apart(path, kind, modules.get(path)):
        return role
    if _routes(path, modules):
        return "router"
    parts = path.removeprefix(f"{block}.").lower().split(".")  # the names above the block say nothing of the layer
    words = [part for part in parts if not part.isdigit()] or [kind]
    if any(shortcut in word for word in words[-2:] for shortcut in _SHORTCUTS):
        return "shortcut"
    if any("norm" in word for word in words[:-1]) or "modulation" in words[-1]:
        return "modulation"  # a linear inside an adaptive norm
    if words[-1] in _WRAPPERS and len(words) > 1:
        words.pop()
    role = _by_place(words, parts[-1], modules[path.rpartition(".")[0]]) or _ROLE_OF.get(words[-1])
    if role is None:
        return "conv" if kind == "conv" else words[-1]
    if "ff_context" in words:  # the feed-forward of the text stream where image and text run side by side
        return f"context_{role}"
    if role in ("q", "k", "v", "qkv", "o") and any(cross in word for word in words[:-1] for cross in _CROSS):
        return f"cross_{role}"
    return role


def role_outside(path: str, kind: Kind, modules: dict[str, nn.Module], head: nn.Module | None) -> str:
    """Role of a weight in no block: "embedding", "position", "norm", "head", "stem" or "projection". head: the model's own."""
    module = modules.get(path)
    if module is not None and module is head:
        return "head"
    if role := _apart(path, kind, module):
        return role
    if kind == "conv" or "patch_embed" in path:
        return "stem"
    return "head" if path.rpartition(".")[2] in _HEADS else "projection"


def _apart(path: str, kind: Kind, module: nn.Module | None) -> str | None:
    """Roles of what does not multiply an input."""
    if kind not in ("embedding", "table"):
        return None
    name = path.rpartition(".")[2]
    if any(part in name for part in _POSITIONS):
        return "position"
    if kind == "embedding":
        return "embedding"
    return "norm" if module is not None and is_norm(module) else _ROLE_OF.get(name, "parameter")


def _routes(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether this weight sends tokens to experts: part of a router by name or class, or a linear called gate beside experts."""
    parts = path.split(".")
    above = [modules[".".join(parts[:depth])] for depth in range(1, len(parts))]
    if "router" in parts or any(type(module).__name__.lower().endswith("router") for module in above):
        return True
    if path in modules and is_router(modules[path]):
        return True
    beside = [name for name, _ in above[-1].named_children()] if above else []
    return parts[-1] in _ROUTERS and any("expert" in name for name in beside)


def _by_place(words: Sequence[str], last: str, parent: nn.Module) -> str | None:
    """Roles of names that mean different things in different places: dense, proj, wo, a number in a list."""
    name, above = words[-1], words[-2] if len(words) > 1 else ""
    in_attention = any(part in word for word in words[-3:-1] for part in _ATTENTION)
    if in_attention and name == "in_proj":
        return "qkv"
    if in_attention and name in _AT_THE_END:
        return "o"
    if name in ("in_proj", "out_proj") and above in _SEQUENCES:
        return "fc1" if name == "in_proj" else "fc2"
    if name == "proj" or above in ("intermediate", "intermediate_query"):
        return "fc1"
    if name in ("dense", "c_proj", "wo"):
        gated = any(child in ("wi_0", "w1") for child, _ in parent.named_children())
        return "down" if gated else "fc2"
    if name in _SEQUENCES:
        return "fc2" if last.isdigit() and int(last) > 0 else "fc1"
    return None
