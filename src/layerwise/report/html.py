"""One small HTML file that explains a run: nothing is fetched from elsewhere, the pictures are inline SVG."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..plan import Plan
from ..structure.parts import Layer
from .depth import Quantity, labels, value_of
from .plots import COLOURS

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: .2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; } tr.best { background: var(--soft); font-weight: 600; }
.wide { overflow-x: auto; } svg { width: 100%; height: 110px; background: var(--soft); } .key span { margin-right: 1rem; }
i { display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; }
"""


def html_report(
    *,
    title: str,
    protocol: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    plans: Mapping[str, Plan],
    layers: Sequence[Layer],
    outcome: Sequence[str],
    best: str | None = None,
) -> str:
    """The text of the file.

    rows: the table, one mapping of column -> value per method (dense, uniform, random, ours); the first column names it, and the row
    named `best` is marked. protocol: what belongs beside every number. outcome: sentences on what became smaller or faster and what
    did not (`io.Saved.lines`). plans: method -> its plan, drawn as one bar per layer: sparsity, bits, or one picture for each.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Result</h2>",
        _table(rows, best),
        "<h2>How it was measured</h2>",
        _pairs(protocol),
        "<h2>What became smaller or faster, and what did not</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in outcome) + "</ul>",
    ]
    if plans:
        parts += ["<h2>Every layer, in the order of the model</h2>", _key(layers)]
        parts += [_plan(name, plan, layers) for name, plan in plans.items()]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]], best: str | None) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        mark = ' class="best"' if best is not None and row.get(columns[0]) == best else ""
        cells = "".join(f"<td>{escape(_text(row.get(column)))}</td>" for column in columns)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _pairs(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(_text(value))}</td></tr>" for key, value in facts.items())
    return f'<div class="wide"><table>{rows}</table></div>'


def _key(layers: Sequence[Layer]) -> str:
    spans = (
        f'<span><i style="background:{colour}"></i>{escape(role)}</span>' for role, colour in _colours(layers).items()
    )
    return f'<p class="key">{"".join(spans)}</p>'


def _plan(name: str, plan: Plan, layers: Sequence[Layer]) -> str:
    """A picture of what the plan does to these layers: of zeros, of bits, or of both."""
    zeros, bits = (_picture(plan, layers, quantity) for quantity in ("sparsity", "bits"))
    parts = []
    if zeros:
        parts.append(f"{plan.achieved_sparsity(layers):.2%} of the weights it prunes are zero")
    if bits:
        parts.append(f"{plan.achieved_bits(layers):.2f} bits per weight it quantises, scales and zeros counted")
    said = "; ".join(parts) or "leaves all of these layers as they are"
    return f"<h3>{escape(name)}: {said}</h3>{zeros}{bits}"


def _picture(plan: Plan, layers: Sequence[Layer], quantity: Quantity) -> str:
    """One bar per layer; hovering names it. A layer that the plan leaves alone has no bar. Nothing where it leaves all alone."""
    whole = 1.0 if quantity == "sparsity" else max(8.0, *(value_of(plan, layer, quantity) or 0.0 for layer in layers))
    colours, bars, rows = _colours(layers), [], []
    for place, (layer, label) in enumerate(zip(layers, labels(layers), strict=True)):
        if (value := value_of(plan, layer, quantity)) is None:
            continue
        entry = plan.layers[layer.name]
        if entry.prune and quantity == "sparsity":
            facts = {"sparsity": f"{value:.2%}", "pattern": entry.prune.pattern}
        else:
            facts = {"bits": f"{value:g} bits", "group": f"group {(entry.quantize and entry.quantize.group) or 'row'}"}
        text = escape(f"{layer.name}: {' '.join(facts.values())}")
        height = round(100 * value / whole, 2)
        bars.append(
            f'<rect x="{place}" y="{round(100 - height, 2)}" width=".85" height="{height}" fill="{colours[label]}">'
            f"<title>{text}</title></rect>"
        )
        rows.append({"layer": layer.name, "weights": layer.size, **facts})
    if not bars:
        return ""
    full = "100 %" if quantity == "sparsity" else f"{whole:g} bits"
    picture = (
        f'<svg viewBox="0 0 {len(layers)} 100" preserveAspectRatio="none" role="img"'
        f' aria-label="{quantity} per layer, full height is {full}">{"".join(bars)}</svg>'
    )
    return f"{picture}<details><summary>{len(rows)} layers as a table</summary>{_table(rows, None)}</details>"


def _colours(layers: Sequence[Layer]) -> dict[str, str]:
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(dict.fromkeys(labels(layers)))}


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
