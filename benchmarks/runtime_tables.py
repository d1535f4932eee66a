"""The tables of `runtime.py`: where forms break even, linears, whole models."""

from typing import Any

BATCHES = (1, 16, 256)


def break_even(layers: list[dict[str, Any]]) -> list[str]:
    """The highest density measured up to which, from the lowest on, some form is faster than dense."""
    lines = [
        "## Break-even",
        "",
        "The highest density measured at which a form beats dense, as it does at all lower ones; `–`: at none. Below it is faster, above it"
        " nothing is promised.",
        "",
        f"| pattern | {' | '.join(f'batch {batch}' for batch in BATCHES)} |",
        f"|---|{'--:|' * len(BATCHES)}",
    ]
    for pattern in dict.fromkeys(row["pattern"] for row in layers):
        cells = []
        for batch in BATCHES:
            rows = sorted(
                (row for row in layers if (row["pattern"], row["batch"]) == (pattern, batch)),
                key=lambda row: row["density"],
            )
            last = "–"
            for row in rows:
                if row["chosen"] == "dense":
                    break
                last = f"{row['density']:g} ({row['chosen']} {row['ratios'][row['chosen']]:.2f})"
            cells.append(last)
        lines.append(f"| {pattern} | {' | '.join(cells)} |")
    return lines


def could_not(rows: list[dict[str, Any]]) -> list[str]:
    """Forms whose kernels were there and did not run, or gave something else."""
    found = sorted(
        {f"- {form}, {row['pattern']}: {why}" for row in rows for form, why in row["failed"].items() if "Error" in why}
    )
    return ["", "Could not run:", "", *found] if found else []


def layer_table(layers: list[dict[str, Any]]) -> list[str]:
    forms = sorted({form for row in layers for form in row["ratios"]})
    lines = [
        f"| pattern | density | batch | dense ms | {' | '.join(forms)} |",
        f"|---|--:|--:|--:|{'--:|' * len(forms)}",
    ]
    for row in layers:
        cells = []
        for form in forms:
            ratio = row["ratios"].get(form)
            cell = "" if ratio is None else f"{ratio:.2f}"
            cells.append(f"**{cell}**" if form == row["chosen"] else cell)
        lines.append(
            f"| {row['pattern']} | {row['density']:g} | {row['batch']} | {row['dense_ms']:.3f} | {' | '.join(cells)} |"
        )
    return lines


def model_table(models: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| pattern | density | batch | forms | dense ms | ratio | lower quartile |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for row in models:
        forms = ", ".join(f"{count} {form}" for form, count in sorted(row["forms"].items()))
        times = "– | 1 (dense) | –"
        if row["ratio"] is not None:
            times = f"{row['dense_ms']:.2f} | {row['ratio']:.2f} | {row['low']:.2f}"
        lines.append(f"| {row['pattern']} | {row['density']:g} | {row['batch']} | {forms} | {times} |")
    return lines
