"""Groups of coupled channels: what must be cut together so that a model stays a model, as indices into parameters.

Removing a unit (a channel of an MLP, a key/value head with its query heads) removes rows of the layers that write it, columns of the
layers that read it, and their biases. Transformers are read by roles, from explicit tables (`coupled_heads.py`, here for MLPs); what is in
no table is left whole, with the reason. Dependency graphs traced from a run are for convolutional networks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .find import structure_of
from .parts import Layer, Structure

GroupKind = Literal["channels", "heads"]
_INTERLEAVED = ("GptOssExperts",)  # gate and up in turn, not one behind the other
_HALVES = (
    "MixtralExperts Qwen2MoeExperts Qwen3MoeExperts Qwen3NextExperts Llama4TextExperts OlmoeExperts DeepseekV2Experts"
    " DeepseekV3Experts Glm4MoeExperts MiniMaxExperts Phi3MLP GlmMLP Glm4MLP"
).split()


_EXPERTS = 8  # of 16-bit numbers to 16 bytes


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of one parameter that go with the units of a group.

    index: int64 (units, entries): the entries along `dim` that belong to each unit; no entry is in two of them. side: "out" for what
    writes the unit's values (rows, biases), "in" for what reads them: zeros in every "in" part remove its effect. scored: a bias goes
    with its rows and is no part of a score.
    """

    parameter: str
    dim: int
    index: Tensor
    side: Literal["out", "in"]
    scored: bool = True


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind in one module. `name` is what a plan's `resize` names: the module path of an attention or an MLP.

    head_dim, queries: of heads, the size of one and the query heads of each key/value head, else 0. multiple: what the number of
    units that stay must divide by (fused experts run by grouped products, whose rows start at multiples of 16 bytes).
    """

    name: str
    kind: GroupKind
    units: int
    parts: tuple[Part, ...]
    block: str
    head_dim: int = 0
    queries: int = 0
    multiple: int = 1

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.units * self.queries


@dataclass(frozen=True, eq=False)
class Coupling:
    """The groups of a model in running order, and the attentions and MLPs that are left whole, with the reason."""

    groups: tuple[Group, ...]
    left: tuple[tuple[str, str], ...]

    def __getitem__(self, name: str) -> Group:
        """The group of this name. Raises ModelError, with the reason where it is one that is left whole."""
        known = {group.name: group for group in self.groups}
        if name not in known:
            reason = dict(self.left).get(name, f"no attention or MLP that can be cut; there are {len(known)}")
            raise ModelError(f'"{name}": {reason}.')
        return known[name]


def coupled_groups(model: nn.Module, structure: Structure | None = None) -> Coupling:
    """The units of every attention and MLP in the blocks of the model.

    structure: of all weights in blocks (`structure_of(model)` by default; excluded layers leave their group whole).
    """
    from .coupled_heads import heads_of, shares_keys

    structure = structure or structure_of(model)
    groups: list[Group] = []
    left: list[tuple[str, str]] = []
    owners = _owners(model)
    sharing = {stack.name for stack in structure.stacks if shares_keys(model.get_submodule(stack.name))}
    for block in structure.blocks:
        modules = _by_module(block.layers)
        for name, layers in modules.items():
            found = heads_of(model, block, name, layers) or channels_of(model, block.name, name, layers)
            if isinstance(found, Group) and found.kind == "heads" and block.stack in sharing:
                found = "other blocks of its stack may read its keys and values"
            if isinstance(found, Group):
                names = (part.parameter for part in found.parts)
                shared = next((one for one in names if owners[id(model.get_parameter(one))] > 1), None)
                if shared is None:
                    groups.append(found)
                else:
                    left.append((name, f'"{shared}" is the weight of other layers, too'))
            elif found is not None:
                left.append((name, found))
    return Coupling(tuple(groups), tuple(left))


def _owners(model: nn.Module) -> Counter[int]:
    """Parameter, by identity -> how many modules have it. A module that is used in several places counts once: it can be cut."""
    return Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)


def numbers_of(model: nn.Module, group: Group) -> int:
    """Parameters, biases and shared norms counted, that one unit of the group takes along."""
    total = 0
    for part in group.parts:
        parameter = model.get_parameter(part.parameter)
        total += parameter.numel() // parameter.shape[part.dim] * part.index.shape[1]
    return total


def _by_module(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Attention or MLP -> its layers. An output beside its attention (BERT's `output.dense`) joins the q, k and v above it."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        path = layer.parameter.rpartition(".")[0]
        place = path if layer.kind == "experts" else path.rpartition(".")[0]
        base = layer.role.removeprefix("cross_")
        if base in ("o", "fc2"):
            first = {"o": ("q", "qkv"), "fc2": ("fc1",)}[base]
            prefix = layer.role.removesuffix(base)
            owners = [
                name
                for name, members in found.items()
                if any(one.role in {prefix + f for f in first} for one in members)
            ]
            near = [name for name in owners if _shared(name, path)]
            place = near[-1] if near else place
        found.setdefault(place, []).append(layer)
    return found


def _shared(owner: str, path: str) -> bool:
    return path.startswith((owner + ".", owner.rpartition(".")[0] + "."))


def channels_of(model: nn.Module, block: str, name: str, layers: Sequence[Layer]) -> Group | str | None:
    """The channels of an MLP; why it is left whole; None for what is no MLP."""
    roles = {layer.role: layer for layer in layers}
    module = type(model.get_submodule(name)).__name__
    if "down" in roles and ("gate_up" in roles or {"gate", "up"} <= roles.keys()):
        read = roles["down"]
        written = [roles[role] for role in ("gate_up", "gate", "up") if role in roles]
    elif {"fc1", "fc2"} <= roles.keys():
        read, written = roles["fc2"], [roles["fc1"]]
    else:
        return "its MLP is of no known form" if roles.keys() & {"fc1", "gate", "up", "gate_up"} else None
    width = read.columns
    parts: list[Part] = []
    for layer in written:
        if layer.role == "gate_up" and module not in (*_HALVES, *_INTERLEAVED):
            return f"{module} is in no table of how gate and up lie in one weight"
        index = _gate_up(width, interleaved=module in _INTERLEAVED) if layer.role == "gate_up" else _each(width)
        if layer.rows != index.numel():
            return f'"{layer.name}" writes {layer.rows} values, "{read.name}" reads {width}'
        parts += _rows(model, layer, index)
    parts.append(Part(read.parameter, _dim(read, "in"), _each(width), "in"))
    if odd := _between(model, name, parts, width, block):
        return f'"{odd}" lies between its layers'
    return Group(name, "channels", width, tuple(parts), block, multiple=_EXPERTS if read.kind == "experts" else 1)


def _rows(model: nn.Module, layer: Layer, index: Tensor) -> list[Part]:
    """The rows of a layer and its bias."""
    parts = [Part(layer.parameter, _dim(layer, "out"), index, "out")]
    owner, _, own = layer.parameter.rpartition(".")
    for bias in (f"{owner}.bias", f"{owner}.{own}_bias"):  # the second of fused experts
        if _has(model, bias) and model.get_parameter(bias).shape[-1] == layer.rows:
            parts.append(Part(bias, model.get_parameter(bias).ndim - 1, index, "out", scored=False))
    return parts


def _between(model: nn.Module, name: str, parts: Sequence[Part], width: int, block: str) -> str | None:
    """A parameter as wide as the channels that is no part of the group: a norm in the middle of the MLP."""
    if name == block:
        return None
    known = {part.parameter for part in parts}
    for own, parameter in model.get_submodule(name).named_parameters():
        full = f"{name}.{own}"
        if full not in known and parameter.ndim == 1 and parameter.shape[0] == width and not own.endswith("bias"):
            return full
    return None


def _dim(layer: Layer, side: str) -> int:
    """The dimension of the stored weight that counts outputs or inputs."""
    outputs, inputs = (
        (len(layer.shape) - 1, len(layer.shape) - 2)
        if layer.transposed
        else (len(layer.shape) - 2, len(layer.shape) - 1)
    )
    return outputs if side == "out" else inputs


def _each(width: int) -> Tensor:
    # on the CPU whatever the default: a model may be built without memory around us
    return torch.arange(width, device="cpu").unsqueeze(1)


def _gate_up(width: int, *, interleaved: bool) -> Tensor:
    each = torch.arange(width, device="cpu").unsqueeze(1)
    return torch.cat([2 * each, 2 * each + 1] if interleaved else [each, each + width], dim=1)


def _has(model: nn.Module, parameter: str) -> bool:
    try:
        model.get_parameter(parameter)
    except AttributeError:
        return False
    return True
