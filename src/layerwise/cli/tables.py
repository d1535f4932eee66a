"""Tables of compared methods: on the screen, as Markdown, as one HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..files import output_file
from .screen import table

if TYPE_CHECKING:
    from ..evaluate.compare import Row
    from ..plan import Plan
    from ..structure import Structure


COLUMNS = ["method", "solver", "sparsity", "perplexity", "KL", "top-1", "seconds", "peak MB"]


def by_budget(made: "Sequence[Row]") -> "list[list[Row]]":
    """Rows that compete: same solver, same budget."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in made:
        groups.setdefault((row.solver, row.sparsity), []).append(row)
    return list(groups.values())


def results_table(made: "Sequence[Row]", dense: float) -> Table:
    """The table for people: the best of each budget in bold green."""
    from ..evaluate.compare import best

    shown = table(*COLUMNS, left=2)
    shown.add_row(*_dense(dense), style="dim")
    for group in by_budget(made):
        shown.add_row()
        for row in group:
            shown.add_row(*cells_of(row), style="bold green" if row is best(group) else "")
    return shown


def cells_of(row: "Row") -> list[str]:
    """The row in words, one per column; mean ± deviation where there are several seeds."""
    return [
        row.method,
        row.solver,
        f"{row.achieved:.3%}",
        _with_deviation(row.perplexity, row.perplexity_deviation, ".2f", row),
        _with_deviation(row.kl, row.kl_deviation, ".3f", row),
        _with_deviation(100 * row.top1, 100 * row.top1_deviation, ".1f", row) + "%",
        f"{row.seconds:.1f}",
        f"{row.peak / 1e6:,.0f}",
    ]


def write_report(
    output: Path,
    title: str,
    protocol: Mapping[str, Any],
    made: "Sequence[Row]",
    dense: float,
    outcome: Sequence[str],
    plans: "Mapping[str, Plan]",
    structure: "Structure",
) -> None:
    """One page, .md or .html by its name; whole or not at all. Raises OutputError."""
    from ..evaluate.compare import best

    lines = [_dense(dense), *(cells_of(row) for row in made)]
    if output.suffix == ".html":
        from ..report import html_report

        named = [{"method": ", ".join(line[:2]), **dict(zip(COLUMNS[2:], line[2:], strict=True))} for line in lines]
        top = best(made)
        text = html_report(
            title=title, protocol=protocol, rows=named, plans=plans, layers=structure.layers, outcome=outcome,
            best=f"{top.method}, {top.solver}",
        )  # fmt: skip
    else:
        rule = "|".join(["---"] * 2 + ["---:"] * (len(COLUMNS) - 2))
        grid = [f"| {' | '.join(line)} |" for line in [COLUMNS, *lines]]
        facts = [f"- {key}: {value}" for key, value in protocol.items()]
        text = "\n".join([f"# {title}", "", grid[0], f"|{rule}|", *grid[1:], "", *outcome, "", *facts]) + "\n"
    with output_file(output) as partial:
        partial.write_text(text, encoding="utf-8")


def _dense(perplexity: float) -> list[str]:
    return ["dense", "–", "0%", f"{perplexity:.2f}", "0", "100%", "–", "–"]


def _with_deviation(mean: float, deviation: float, form: str, row: "Row") -> str:
    return f"{mean:{form}} ± {deviation:{form}}" if len(row.seeds) > 1 else f"{mean:{form}}"
