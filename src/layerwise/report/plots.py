"""Pictures of plans as PNG files. matplotlib comes with `layerwise[report]` and is imported only here, inside functions."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingExtra
from ..files import output_file
from ..plan import Plan
from ..structure.parts import Layer
from .depth import WHOLE_BLOCK, Depth, Quantity, by_depth

# Okabe & Ito's colours, which colour-blind readers can tell apart; markers tell lines apart in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#666666")
_MARKERS = "os^Dv<>Ph*X"
_MOST_TICKS = 16


def plot_sparsities(plans: Mapping[str, Plan], layers: Sequence[Layer], path: str | Path) -> Path:
    """Draw a panel per plan: sparsity by block, a line per role, the plan's own mean dashed. Writes a PNG, replacing `path`.

    Raises ConfigError if no plan prunes any of these layers, MissingExtra without matplotlib, OutputError if it cannot be written.
    """
    return _plot(plans, layers, Path(path), "sparsity")


def plot_bits(plans: Mapping[str, Plan], layers: Sequence[Layer], path: str | Path) -> Path:
    """The same of bits: those of the codes for lines, true bits per weight, scales and zeros counted, for the mean. Raises likewise."""
    return _plot(plans, layers, Path(path), "bits")


def _plot(plans: Mapping[str, Plan], layers: Sequence[Layer], path: Path, quantity: Quantity) -> Path:
    depths = {name: depth for name, plan in plans.items() if (depth := by_depth(plan, layers, quantity)).lines}
    if not depths:
        does = "prunes" if quantity == "sparsity" else "quantises"
        raise ConfigError(f"a picture of plans: none of them {does} any of these layers. Give plans of this model.")
    across = 2 if len(depths) == 4 else min(len(depths), 3)
    down = math.ceil(len(depths) / across)
    wide = len(next(iter(depths.values())).columns) > 40
    figure = new_figure((7.5 if wide or across == 1 else 4.6) * across, 3.3 * down + 0.9)
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    styles = _styles(depths)
    for panel, (name, depth) in zip(panels, depths.items(), strict=False):
        _draw(panel, depth, styles)
        if quantity == "sparsity":
            mean = plans[name].achieved_sparsity(layers)
            said = f"mean {mean:.1%}"
        else:
            mean = plans[name].achieved_bits(layers)
            said = f"{mean:.2f} bits, scales and zeros counted"
        panel.axhline(mean, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        panel.set_title(f"{name}  ·  {said}", fontsize=11, loc="left")
    for number, panel in enumerate(panels):
        if number % across == 0:
            panel.set_ylabel(quantity)
        panel.set_visible(number < len(depths))
    _scale(panels[0], depths, quantity)
    _legend(figure, panels[: len(depths)])
    return write_png(figure, path)


def _draw(panel: Any, depth: Depth, styles: Mapping[str, tuple[str, str]]) -> None:
    dense = len(depth.columns) > 24
    for label, line in depth.lines.items():
        colour, marker = styles[label]
        panel.plot(
            [column for column, _ in line],
            [value for _, value in line],
            color=colour,
            marker=marker,
            markersize=3.2 if dense else 5,
            linewidth=0.8 if dense else 1.4,
            alpha=0.8,
            label=label,
        )
    step = math.ceil(len(depth.columns) / _MOST_TICKS)
    ticks = range(0, len(depth.columns), step)
    names = [depth.columns[tick] for tick in ticks]
    slanted = max(len(name) for name in names) > 3 and len(names) > 4
    panel.set_xticks(list(ticks), names, rotation=45 if slanted else 0, ha="right" if slanted else "center", fontsize=8)
    panel.set_xlim(-0.6, len(depth.columns) - 0.4)
    panel.set_xlabel("block, in the order of the model")
    panel.grid(axis="y", color="#dddddd", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _styles(depths: Mapping[str, Depth]) -> dict[str, tuple[str, str]]:
    """One colour and marker per role, the same in every panel; a line of several roles has those of its first."""
    names = list(dict.fromkeys(name for depth in depths.values() for name in depth.lines if name != WHOLE_BLOCK))
    roles = list(dict.fromkeys(role for name in names for role in name.split(", ")))
    looks = {role: (COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, role in enumerate(roles)}
    return {WHOLE_BLOCK: ("#111111", "o"), **{name: looks[name.split(", ")[0]] for name in names}}


def _scale(panel: Any, depths: Mapping[str, Depth], quantity: Quantity) -> None:
    """One scale for all panels. Sparsities: shows the differences, not from zero, but never narrower than ten points."""
    values = [value for depth in depths.values() for line in depth.lines.values() for _, value in line]
    low, high = min(values), max(values)
    if quantity == "bits":
        panel.set_ylim(0, high + 1)  # the mean with scales and zeros lies above the levels
        return
    room = max(0.05 * (high - low), (0.1 - (high - low)) / 2, 0.01)
    panel.set_ylim(max(-0.02, low - room), min(1.02, high + room))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 8),
        frameon=False,
        fontsize=9,
    )


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches on an Agg canvas: no window, no pyplot, no global state. Raises MissingExtra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":  # installed but broken: do not tell the user to install it
            raise
        raise MissingExtra("a plot needs matplotlib: pip install 'layerwise[report]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, path: Path) -> Path:
    """The figure as a file, whole or not at all. Raises OutputError."""
    with output_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path
