"""What a plan says of training on the screen: how often each block is trained, and by how much its learning rate is multiplied."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .screen import Screen, table

if TYPE_CHECKING:
    from ..plan import Plan

MOST_BARS = 48  # blocks or layers; more get no chart in the terminal


def trains(plan: "Plan") -> bool:
    """Whether any entry of the plan is about training."""
    return any(entry.train for entry in plan.layers.values())


def show_train(plan: "Plan", screen: Screen) -> None:
    """Probabilities with the score they are from and the share of periods that they come to; rates beside them, or drawn on their own."""
    from ..recover import probabilities_of, rates_of

    name, rates = f"[bold]{plan.method.get('name', 'plan')}[/]", rates_of(plan)
    drawn = any(entry.train and entry.train.probability is not None for entry in plan.layers.values())
    if drawn:
        _show_draw(name, plan, probabilities_of(plan), screen)
    if rates:
        screen.show(f"{name}: learning rates of {len(rates)} layers or blocks, times {_range(rates)}\n")
        _bars(rates, screen, ".2f")


def _show_draw(name: str, plan: "Plan", probabilities: Mapping[str, float], screen: Screen) -> None:
    from ..recover import inclusion
    from ..recover.draw import check_draw, normalised

    known = normalised(probabilities)
    blocks, draw = plan.method.get("blocks"), plan.method.get("draw", "exact")
    share: Mapping[str, float] = {}
    if isinstance(blocks, int):
        check_draw(known, blocks, draw)
        share = inclusion(known, blocks, draw)
    said = f"{blocks} of {len(known)} blocks are trained at a time" if share else f"{len(known)} blocks are drawn from"
    period = f", others every {plan.method['period']} steps" if "period" in plan.method else ""
    screen.show(f"{name}: {said}{period}\n")
    if len(known) <= MOST_BARS:
        _bars(share or known, screen, ".1%", 1.0 if share else None)
    screen.show("", _rows(plan, known, share))


def _rows(plan: "Plan", probabilities: Mapping[str, float], share: Mapping[str, float]) -> Any:
    rows = table("block", "score", "probability", *(["trained in"] if share else []))
    for block, probability in probabilities.items():
        score = f"{plan.scores[block]:.4g}" if block in plan.scores else "–"
        rows.add_row(block, score, f"{probability:.2%}", *([f"{share[block]:.1%}"] if share else []))
    return rows


def _bars(values: Mapping[str, float], screen: Screen, form: str, maximum: float | None = None) -> None:
    from ..report import bar_chart

    if 1 < len(values) <= MOST_BARS:
        width, plain = min(screen.out.width, 100), screen.out.encoding == "ascii"
        most = maximum or max(values.values())
        screen.show(Text(bar_chart(dict(values), width, form=form, maximum=most, ascii_only=plain), style="cyan"))


def _range(values: Mapping[str, float]) -> str:
    return f"{min(values.values()):.3g} to {max(values.values()):.3g}"
