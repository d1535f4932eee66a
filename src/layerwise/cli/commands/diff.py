"""`layerwise diff`: what two plans differ in."""

from typing import Any

from .. import options
from ..screen import Screen, table


def diff(
    first: options.FirstPlan,
    second: options.SecondPlan,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what two plans differ in, settings first, then layer by layer.

    [dim]Example:[/]  layerwise diff plan.yaml edited.yaml
    """
    from ...plan import Plan, diff_plans

    screen = Screen(json=json)
    before, after = Plan.load(first), Plan.load(second)
    changes = diff_plans(before, after)
    rows = table("where", "what", str(first), str(second), left=2)
    for change in changes:
        rows.add_row(change.layer or "plan", change.field, _text(change.before), _text(change.after))
    screen.show(rows if changes else "The plans say the same.")
    layers = {change.layer for change in changes if change.layer}
    if changes:
        screen.show(f"\n{len(layers)} of {len({**before.layers, **after.layers})} layers differ.")
    screen.show_json([{"layer": c.layer, "field": c.field, "before": c.before, "after": c.after} for c in changes])


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
