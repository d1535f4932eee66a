"""Bits of a KV cache on the screen: what was measured, and what each attention gets."""

from typing import TYPE_CHECKING

from rich.text import Text

from .screen import Screen, table

if TYPE_CHECKING:
    from ..methods import KVSearch
    from ..plan import Plan

MOST_BARS = 48  # attentions; more get no chart in the terminal


def show_front(search: "KVSearch", screen: Screen) -> None:
    """The front of bits and loss, and the uniform pairs beside it; the choice in bold."""
    chosen = tuple(
        (entry.cache.key_bits, entry.cache.value_bits) for entry in search.plan.layers.values() if entry.cache
    )
    front = {one.pairs for one in search.front}
    rows = table("choice", "true bits", "nominal", "loss", "on unseen data", "")
    for one in search.tried:
        if not (one.uniform or one.pairs in front or one.pairs == chosen):
            continue
        figures = [f"{one.true:.3f}", f"{one.nominal:.3f}", f"{one.loss:.4g}"]
        unseen = "" if one.unseen is None else f"{one.unseen:.4g}"
        said = ["uniform"] * one.uniform + ["on the front"] * (one.pairs in front) + ["chosen"] * (one.pairs == chosen)
        rows.add_row(one.word, *figures, unseen, ", ".join(said), style="bold green" if one.pairs == chosen else "")
    screen.show(rows, "")


def show_cache(plan: "Plan", screen: Screen) -> None:
    """Bits of keys and values of every attention of the plan, and a bar for their mean."""
    from ..report import bar_chart

    entries = {name: entry.cache for name, entry in plan.layers.items() if entry.cache}
    means = {name: (one.key_bits + one.value_bits) / 2 for name, one in entries.items()}
    mean = sum(means.values()) / len(means)
    modes = ", ".join(sorted({one.mode for one in entries.values()}))
    screen.show(
        f"[bold]{plan.method.get('name', 'plan')}[/]: {mean:.4f} nominal bits a cached number, mean of {len(means)} attentions ({modes})\n"
    )
    if 1 < len(means) <= MOST_BARS:
        named = {f"{name} K{one.key_bits}V{one.value_bits}": means[name] for name, one in entries.items()}
        width, plain = min(screen.out.width, 100), screen.out.encoding == "ascii"
        screen.show(
            Text(bar_chart(named, width, form=".1f", maximum=max(means.values()), ascii_only=plain), style="cyan")
        )
