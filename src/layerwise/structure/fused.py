"""Linears that serving engines fuse into one: q, k and v, gate and up, all experts of a block. They are stored alike, or fail to load."""

from collections.abc import Iterable

_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),  # linear attention of Qwen3.5
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # latent attention of DeepSeek, GLM, Kimi
)
_PLACE = {name: index for index, names in enumerate(_TOGETHER) for name in names}

VLLM_BITS = (2, 4, 8)  # that it runs, and of experts; why is in `io.targets`
VLLM_EXPERT_BITS = (4, 8)


def fused_of(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names of layers that go together, two or more in a group, in the order given; a layer that goes with no other is in none."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        above, _, own = name.rpartition(".")
        before, experts, _ = name.partition(".experts.")
        if experts:
            groups.setdefault((before, -1), []).append(name)
        elif own in _PLACE:
            groups.setdefault((above, _PLACE[own]), []).append(name)
    return [tuple(members) for members in groups.values() if len(members) > 1]
