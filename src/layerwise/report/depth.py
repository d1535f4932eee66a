"""A plan's sparsities or bits by depth: the columns and lines that every picture of a plan draws."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..plan import Plan
from ..structure.parts import Layer

Quantity = Literal["sparsity", "bits"]
ALIKE = 0.002  # sparsities nearer than this cannot be told apart in a picture; exact budgets differ by a few weights
WHOLE_BLOCK = "all layers"  # the line of a plan that treats the layers of a block alike


@dataclass(frozen=True)
class Depth:
    """`columns`: a short name per block, and per layer outside the blocks, in the order of the model.

    `lines`: role (or the name inside the block, where a block has a role twice) -> [(column, value)], in that order. Lines that lie
    on each other would hide all but the last, so they are one: "k, v", or "all layers" where no layer differs from its block.
    """

    columns: tuple[str, ...]
    lines: dict[str, list[tuple[int, float]]]


def by_depth(plan: Plan, layers: Sequence[Layer], quantity: Quantity = "sparsity") -> Depth:
    """Where each layer stands and how sparse it is, or how many bits it takes, scales and zeros not counted.

    Layers that the plan does not prune, or quantise, are absent from the lines.
    """
    homes = list(dict.fromkeys(layer.block or layer.name for layer in layers))
    place = {home: column for column, home in enumerate(homes)}
    lines: dict[str, list[tuple[int, float]]] = {}
    for layer, label in zip(layers, labels(layers), strict=True):
        if (value := value_of(plan, layer, quantity)) is not None:
            lines.setdefault(label, []).append((place[layer.block or layer.name], value))
    return Depth(tuple(short_names(homes)), _merged(lines))


def value_of(plan: Plan, layer: Layer, quantity: Quantity) -> float | None:
    """What the plan gives this layer; None where it does not treat it so."""
    if (entry := plan.layers.get(layer.name)) is None:
        return None
    if quantity == "bits":
        return float(entry.quantize.bits) if entry.quantize else None
    return entry.prune.sparsity if entry.prune else None


def _merged(lines: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    columns: dict[int, list[float]] = {}
    for column, value in (point for line in lines.values() for point in line):
        columns.setdefault(column, []).append(value)
    if len(lines) > 1 and all(max(values) - min(values) < ALIKE for values in columns.values()):
        return {WHOLE_BLOCK: [(column, sum(values) / len(values)) for column, values in sorted(columns.items())]}
    groups: list[list[str]] = []
    for name, line in lines.items():
        group = next((group for group in groups if _alike(lines[group[0]], line)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return {", ".join(group): lines[group[0]] for group in groups}


def _alike(one: list[tuple[int, float]], two: list[tuple[int, float]]) -> bool:
    same_columns = [column for column, _ in one] == [column for column, _ in two]
    return same_columns and all(abs(a - b) < ALIKE for (_, a), (_, b) in zip(one, two, strict=True))


def labels(layers: Sequence[Layer]) -> list[str]:
    """The role of each layer, or its name inside the block where some block has that role twice (conv1, conv2)."""
    counts = Counter((layer.block, layer.role) for layer in layers if layer.block)
    twice = {role for (_, role), count in counts.items() if count > 1}
    return [
        layer.name.removeprefix(f"{layer.block}.") if layer.block and layer.role in twice else layer.role
        for layer in layers
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts that all share: model.layers.0, model.layers.1 -> 0, 1."""
    split = [name.split(".") for name in names]
    shared = 0
    while (
        len(names) > 1
        and all(len(parts) > shared + 1 for parts in split)
        and len({parts[shared] for parts in split}) == 1
    ):
        shared += 1
    return [".".join(parts[shared:]) for parts in split]
