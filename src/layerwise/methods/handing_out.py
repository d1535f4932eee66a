"""What the methods that hand out bits share: their common settings, what shares a level, what it costs, and the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ..allocate import Costs, check_levels, merged
from ..errors import ConfigError, ModelError, ShapeError
from ..plan import Budget, GroupBits, Plan, Quantize
from ..structure import Layer, Structure, fused_of
from ..structure.fused import VLLM_BITS, VLLM_EXPERT_BITS
from .assemble import found, named_plan
from .base import Method

Unit = Literal["block", "layer"]
Target = Literal["any", "transformers", "vllm"]
Indivisible = Literal["smaller", "row", "error"]

LEAST_GROUP = 32  # smaller ones cost half a bit a weight and more, and no engine runs them


@dataclass(frozen=True)
class BitSettings:
    """Base of the methods that hand out bits: frozen, flat, plain values that are written into the plan."""

    # average over the weights that are quantised, never exceeded: true bits, scales and zeros counted
    bits: float = 3.25
    levels: str = "2,4"  # bits that a weight can get
    granularity: Unit = "block"  # what shares one level
    group: int = 128  # inputs that share a scale; 0: all of a row
    # transformers cannot read packed weights that have zeros of their own (compressed-tensors 0.18 to 0.20)
    symmetric: bool = True
    # what the solver stores of each group; compress hands in what its own does
    shift: bool = False  # zeros are any numbers, as wide as a scale (HQQ, shift grids), not whole ones of as many bits as a weight
    scale_bits: int = 16
    nominal: bool = False  # the average is of the levels alone
    # whose folders it is for. vllm: what it fuses (q, k, v; gate, up; all experts of a block) shares a level, of 2, 4 and 8, experts of
    # 4 and 8. transformers: all experts of the model share one
    target: Target = "any"
    # layers whose inputs the group does not divide: halve it for them down to 32, else one scale for each row; that at once; refuse
    indivisible: Indivisible = "smaller"
    pin_ends: bool = False  # the first and the last block of every stack stay at the highest level

    @property
    def owner(self) -> str:
        """Whose settings these are, for messages."""
        return type(self).__name__

    def __post_init__(self) -> None:
        self.check_words("granularity", get_args(Unit))
        self.check_words("target", get_args(Target))
        self.check_words("indivisible", get_args(Indivisible))
        if not self.bits > 0:
            raise ConfigError(f"{self.owner}.bits={self.bits:g}: give bits per weight, more than 0.")
        if self.group < 0:
            raise ConfigError(f"{self.owner}.group={self.group}: give inputs that share a scale, or 0 for a row.")
        if self.scale_bits < 1:
            raise ConfigError(f"{self.owner}.scale_bits={self.scale_bits}: give the bits of a scale, 16 or 32.")
        chosen = self.chosen_levels
        if self.target == "vllm" and (odd := [level for level in chosen if level not in VLLM_BITS]):
            raise ConfigError(
                f'{self.owner}.levels="{self.levels}": vLLM runs 2, 4 and 8 bits, not {odd[0]}. Give levels=2,4,8 or some of them.'
            )
        if self.target == "vllm" and 8 in chosen and not self.symmetric:
            raise ConfigError(
                f"{self.owner}.symmetric=false: vLLM has no kernel for 8 bits with zeros but on Hopper. Take symmetric=true, or levels=2,4."
            )

    @property
    def group_bits(self) -> GroupBits:
        """What is counted of each group beside its codes."""
        return GroupBits(self.scale_bits, self.shift)

    def check_words(self, field: str, words: Sequence[str]) -> None:
        """Raise ConfigError unless the field is one of these words."""
        if getattr(self, field) not in words:
            raise ConfigError(f'{self.owner}.{field}="{getattr(self, field)}": give {", ".join(words)}.')

    @property
    def chosen_levels(self) -> list[int]:
        """`levels` as numbers, rising. Raises ConfigError for what are none, or not 2 to 8 bits."""
        words = [word.strip() for word in self.levels.split(",")]
        if not all(word.isdigit() and 2 <= int(word) <= 8 for word in words) or len({*words}) < len(words):
            raise ConfigError(
                f'{self.owner}.levels="{self.levels}": give whole bits, 2 to 8, each once, such as levels=2,4.'
            )
        return sorted(map(int, words))


@dataclass(frozen=True)
class Hand:
    """A model's layers as what bits are handed out to. `units` share a level each; costs and sizes are by unit, fixed ones apart."""

    method: Method
    settings: BitSettings
    structure: Structure
    units: dict[str, tuple[Layer, ...]]
    costs: Costs  # unit -> level -> bits; one level where it is pinned
    sizes: dict[str, int]
    notes: tuple[str, ...]

    def treatment(self, layer: Layer, level: int) -> Quantize:
        """What a layer gets at this level."""
        return _treatment(self.settings, layer, level)

    def plan(
        self, model: nn.Module, levels: Mapping[str, int], scores: Mapping[str, float], notes: Sequence[str] = ()
    ) -> Plan:
        """The plan in which every layer has the level of its unit."""
        level_of = {layer.name: levels[unit] for unit, layers in self.units.items() for layer in layers}
        entries = {
            layer.name: self.treatment(layer, level_of[layer.name])
            for layer in self.structure
            if layer.name in level_of
        }
        settings = self.settings
        budget = Budget(bits=settings.bits, nominal=settings.nominal or None).counting(settings.group_bits)
        return named_plan(self.method, model, self.structure, budget, entries, scores, (*self.notes, *notes))


def dealt(method: Method, settings: BitSettings, model: nn.Module, structure: Structure | None) -> Hand:
    """Units with their costs, checked before any work.

    Raises ModelError (nothing to quantise), ShapeError (layers that the group does not divide), BudgetError saying what is feasible.
    """
    structure = found(model, structure)
    layers = [layer for layer in structure if layer.kind != "table"]
    if not layers:
        raise ModelError(f"{type(model).__name__}: none of its layers is a matrix that could be quantised.")
    tables = len(structure.layers) - len(layers)
    notes = [f"{tables} tables (gains of norms, positions) keep their bits."] if tables else []
    odd = [layer for layer in layers if settings.group and layer.columns % settings.group]
    if odd and settings.indivisible == "error":
        raise ShapeError(_indivisible(settings.group, odd, len(layers)))
    if odd:
        notes.append(_regrouped(settings, odd))
    costs = {
        layer.name: {
            level: _treatment(settings, layer, level).stored_bits(
                layer.size, layer.columns, nominal=settings.nominal, group_bits=settings.group_bits
            )
            for level in _levels(settings, layer)
        }
        for layer in layers
    }
    units = _units(structure, layers, settings)
    by_unit = merged(costs, {unit: [layer.name for layer in inside] for unit, inside in units.items()})
    if settings.pin_ends:
        ends = {block.name for stack in structure.stacks for block in (stack.blocks[0], stack.blocks[-1])}
        for unit, inside in units.items():
            if {layer.block for layer in inside} <= ends:
                by_unit[unit] = {max(by_unit[unit]): by_unit[unit][max(by_unit[unit])]}
    sizes = {unit: sum(layer.size for layer in inside) for unit, inside in units.items()}
    check_levels(by_unit, sizes, settings.bits)
    return Hand(method, settings, structure, units, by_unit, sizes, tuple(notes))


def _units(structure: Structure, layers: Sequence[Layer], settings: BitSettings) -> dict[str, tuple[Layer, ...]]:
    """Name -> the layers that share one level, in the order of the structure. A unit has the name of its block, or of its first layer."""
    # for transformers alone: tied beyond their blocks
    experts = tuple(layer.name for layer in layers if layer.kind == "experts" and settings.target == "transformers")
    fused = fused_of(layer.name for layer in layers) if settings.target == "vllm" else [experts]
    first_of = {name: members[0] for members in fused for name in members}
    tied: dict[str, list[Layer]] = {}
    for layer in layers:
        if settings.granularity == "block" and layer.block is not None and layer.name not in experts:
            tied.setdefault(layer.block, []).append(layer)
        else:
            tied.setdefault(first_of.get(layer.name, layer.name), []).append(layer)
    blocks = {block.name for block in structure.blocks}
    return {(key if key in blocks else inside[0].name): tuple(inside) for key, inside in tied.items()}


def _levels(settings: BitSettings, layer: Layer) -> list[int]:
    """The levels that a layer can get: of experts those that the engine runs. Raises ConfigError if it runs none."""
    levels = settings.chosen_levels
    if layer.kind != "experts" or settings.target == "any":
        return levels
    if not settings.symmetric:
        raise ConfigError(
            f"{settings.owner}.symmetric=false: {settings.target} reads experts without zeros alone. Take symmetric=true, or leave them"
            " out (--exclude '*.experts*')."
        )
    if settings.target == "vllm" and not (levels := [level for level in levels if level in VLLM_EXPERT_BITS]):
        raise ConfigError(
            f'{settings.owner}.levels="{settings.levels}": vLLM runs experts in 4 and 8 bits. Give one of these, or leave experts out'
            " (--exclude '*.experts*')."
        )
    return levels


def _treatment(settings: BitSettings, layer: Layer, level: int) -> Quantize:
    return Quantize(bits=level, group=_group(settings, layer.columns), symmetric=settings.symmetric)


def _group(settings: BitSettings, columns: int) -> int | None:
    """Inputs that share a scale in rows of this many; None: all of them."""
    group = settings.group
    while settings.indivisible == "smaller" and group >= 2 * LEAST_GROUP and columns % group:
        group //= 2
    return group if group and not columns % group else None


def _regrouped(settings: BitSettings, odd: Sequence[Layer]) -> str:
    counts: dict[int | None, int] = {}
    for layer in odd:
        group = _group(settings, layer.columns)
        counts[group] = counts.get(group, 0) + 1
    shares = [
        f"{number} have {f'groups of {group}' if group else 'one scale a row'}" for group, number in counts.items()
    ]
    return f"groups of {settings.group} do not divide the inputs of {len(odd)} layers: {', '.join(shares)}."


def _indivisible(group: int, odd: Sequence[Layer], layers: int) -> str:
    shown = ", ".join(f'"{layer.name}" ({layer.rows} x {layer.columns})' for layer in odd[:3])
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return (
        f"group={group} does not divide the inputs of {len(odd)} of {layers} layers (outputs x inputs): {shown}{more}."
        " Give another group (--set group=64; 0: a row), exclude them, or let it be smaller for them (indivisible=smaller)"
        " or one scale for each row (indivisible=row)."
    )
