"""A plan on the screen: what it takes away in all, a bar for each block, a line for each role; caches and training as their own tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .cache_tables import show_cache
from .screen import Screen, table
from .train_tables import show_train, trains

if TYPE_CHECKING:
    from ..plan import Plan
    from ..structure import Layer, Structure

MOST_BARS = 48  # a model of more blocks than this gets no chart in the terminal


def show_entries(made: "Plan", structure: "Structure", screen: Screen) -> None:
    """Every kind of treatment that the plan has; its zeros, none, where it has no kind at all."""
    cached, trained = any(entry.cache for entry in made.layers.values()), trains(made)
    if cached:
        show_cache(made, screen)
    if trained:
        show_train(made, screen)
    if narrow := [one for one in made.layers.values() if one.resize or one.drop]:
        show_widths(made, screen)
    quantised = any(entry.quantize for entry in made.layers.values())
    if quantised or made.zeros(structure.layers) or not (cached or trained or narrow):
        show_plan(made, structure, screen)


def show_widths(made: "Plan", screen: Screen) -> None:
    """What stays of attentions and MLPs, and which blocks go, a line each; the budget's note says what that makes of the model."""
    rows = table("", "heads", "key heads", "channels", left=1)
    for name, entry in made.layers.items():
        if entry.drop:
            rows.add_row(name, "dropped", "", "")
        elif (resize := entry.resize) is not None:
            sizes = (resize.heads, resize.kv_heads, resize.channels)
            rows.add_row(name, *("" if size is None else f"{size:,}" for size in sizes))
    screen.show(f"[bold]{made.method.get('name', 'plan')}[/]: what stays; all else stays whole\n", rows)


def show_plan(made: "Plan", structure: "Structure", screen: Screen) -> None:
    """Zeros, bits, factors, of the layers that the plan treats so."""
    zeros = made.zeros(structure.layers)
    bits = {name: entry.quantize.bits for name, entry in made.layers.items() if entry.quantize}
    name = f"[bold]{made.method.get('name', 'plan')}[/]"
    blocks = {name: float(entry.factorize.block) for name, entry in made.layers.items() if entry.factorize}
    if zeros or not (bits or blocks):
        sizes = {layer.name: layer.size for layer in structure.layers}
        total = sum(sizes[one] for one in zeros)
        screen.show(
            f"{name}: {sum(zeros.values()):,} of {total:,} weights become zero"
            f" ({made.achieved_sparsity(structure.layers):.4%} of {len(zeros)} layers)\n"
        )
        shares = {one: zeros[one] / sizes[one] for one in zeros if sizes[one]}
        _chart(_by_block(structure, shares), screen, ".1%", 1.0)
        screen.show("", _by_role(structure, shares, "{:.1%}", ("least sparse", "mean", "most sparse")))
    if bits:
        true, nominal = made.achieved_bits(structure.layers), made.achieved_bits(structure.layers, nominal=True)
        screen.show(
            f"{name}: {true:.4f} bits per weight with scales and zeros, {nominal:.4f} without ({len(bits)} layers)\n"
        )
        levels = {one: float(value) for one, value in bits.items()}
        _chart(_by_block(structure, levels), screen, ".2f", float(max(bits.values())))
        screen.show("", _by_role(structure, levels, "{:.2f}", ("fewest bits", "mean", "most bits")))
    if blocks:
        true, core = made.achieved_bits(structure.layers), made.achieved_bits(structure.layers, nominal=True)
        screen.show(
            f"{name}: {true:.4f} bits per weight with factors, the cores alone {core:.4f} ({len(blocks)} layers)\n",
            _by_role(structure, blocks, "{:.0f}", ("smallest block", "mean", "largest block")),
        )


def _by_block(structure: "Structure", values: Mapping[str, float]) -> dict[str, float]:
    """Block -> mean over the weights of its layers."""
    found = {}
    for block in structure.blocks:
        if inside := [layer for layer in block.layers if layer.name in values]:
            found[block.name] = _mean(inside, values)
    return found


def _mean(layers: "list[Layer]", values: Mapping[str, float]) -> float:
    return sum(values[layer.name] * layer.size for layer in layers) / sum(layer.size for layer in layers)


def _chart(blocks: dict[str, float], screen: Screen, form: str, maximum: float) -> None:
    from ..report import bar_chart

    if 1 < len(blocks) <= MOST_BARS:
        width, plain = min(screen.out.width, 100), screen.out.encoding == "ascii"
        screen.show(Text(bar_chart(blocks, width, form=form, maximum=maximum, ascii_only=plain), style="cyan"))


def _by_role(structure: "Structure", values: Mapping[str, float], form: str, columns: tuple[str, str, str]) -> Any:
    rows = table("role", "layers", "weights", *columns)
    groups: dict[str, list[Layer]] = {}
    for layer in structure.layers:
        if layer.name in values:
            groups.setdefault(layer.role, []).append(layer)
    for role, layers in groups.items():
        of = [values[layer.name] for layer in layers]
        figures = (min(of), _mean(layers, values), max(of))
        size = sum(layer.size for layer in layers)
        rows.add_row(role, str(len(layers)), f"{size:,}", *(form.format(one) for one in figures))
    return rows
