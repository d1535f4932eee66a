"""What a layer does, from the names along its path. One small table of the names that architectures share."""

from collections.abc import Set

from torch import nn

from .parts import Kind
from .weights import is_norm, is_router

_ROLES = {
    "q": "q_proj q query to_q wq q_lin q_b_proj query_proj",
    "k": "k_proj k key to_k wk k_lin key_proj",
    "v": "v_proj v value to_v wv v_lin value_proj",
    "qkv": "qkv qkv_proj c_attn query_key_value wqkv to_qkv in_proj_weight",
    "o": "o_proj o out_proj to_out out_lin attn_out",
    "gate": "gate_proj wi_0 w1 gate",
    "up": "up_proj wi_1 w3",
    "gate_up": "gate_up_proj gate_and_up_proj",
    "down": "down_proj w2",
    "fc1": "fc1 c_fc dense_h_to_4h wi linear1 lin1 linear_fc1 pwconv1 fc_in proj_mlp",
    "fc2": "fc2 dense_4h_to_h linear2 lin2 linear_fc2 pwconv2 fc_out proj_out",
    "context_q": "add_q_proj",
    "context_k": "add_k_proj",
    "context_v": "add_v_proj",
    "context_o": "to_add_out",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_ATTENTION = ("attn", "attention")  # parts of the names of attention modules
_CROSS = ("crossattention", "cross_attn", "encdecattention", "encoder_attn", "crossattn")
_SHORTCUTS = ("shortcut", "downsample", "skip")
_HEADS = ("lm_head", "head", "classifier", "score", "fc", "embed_out", "output_projection", "decoder", "proj_out")
_POSITIONS = ("pos_", "position", "relative_")


def role_in_block(path: str, kind: Kind, modules: dict[str, nn.Module]) -> str:
    """Role of the weight at full `path` inside a block, e.g. "q", "cross_k", "down"; its own name where the table has none.

    modules: path -> module of the model, also of modules reached by several paths.
    """
    module = modules.get(path)
    parent, _, name = path.rpartition(".")
    if role := _apart(path, kind, module):
        return role
    if (module is not None and is_router(module)) or _is_gate_of_experts(name, modules.get(parent)):
        return "router"
    words = [word for word in path.lower().split(".") if not word.isdigit()]
    if any(shortcut in word for word in words[-2:] for shortcut in _SHORTCUTS):
        return "shortcut"
    if any(is_norm(modules[".".join(path.split(".")[:depth])]) for depth in range(1, path.count(".") + 1)):
        return "modulation"  # a linear inside an adaptive norm
    role = _by_siblings(words, set(_child_names(modules.get(parent)))) or _ROLE_OF.get(words[-1])
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
    if kind == "embedding" or kind == "table":
        if any(part in path.rpartition(".")[2] for part in _POSITIONS):
            return "position"
        if kind == "embedding":
            return "embedding"
        return "norm" if module is not None and is_norm(module) else "parameter"
    return None


def _is_gate_of_experts(name: str, parent: nn.Module | None) -> bool:
    """A plain linear called gate or router beside experts; `gate` alone is half of a gated MLP elsewhere."""
    return name in ("gate", "router", "wg", "shared_expert_gate") and any(
        "expert" in child for child in _child_names(parent)
    )


def _child_names(module: nn.Module | None) -> list[str]:
    return [name for name, _ in module.named_children()] if module is not None else []


def _by_siblings(words: list[str], siblings: Set[str]) -> str | None:
    """Names that mean different things in different places: dense, c_proj, wo, proj, net."""
    name, above = words[-1], words[-2] if len(words) > 1 else ""
    in_attention = any(part in word for word in words[-3:-1] for part in _ATTENTION)
    if name in ("dense", "c_proj", "proj", "projection", "wo"):
        if in_attention and name != "wo":
            return "o"
        if name == "proj" or above in ("intermediate", "intermediate_query"):
            return "fc1"
        return "down" if siblings & {"wi_0", "w1"} else "fc2"
    if name == "net":  # diffusers: net.0.proj, dropout, net.2
        return "fc2"
    return None
