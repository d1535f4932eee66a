"""Spectra of layers with the power laws fitted to their tails, as a PNG: what an alpha stands for, to be judged by eye."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..scores import LayerTail
from ..structure.parts import Layer
from .depth import labels, short_names
from .plots import COLOURS, new_figure, write_png

BINS, DECADES = 48, 3.5  # below the largest eigenvalue: the few far smaller ones would take the room of the tail
MOST_BLOCKS, MOST_ROLES = 6, 8  # with panels of their own; the map above them has all
_SPECTRUM, _TAIL = COLOURS[0], COLOURS[1]


@dataclass(frozen=True)
class SpectrumView:
    """What a panel shows of one layer; small, so that those of a whole model can be held.

    density: share of the eigenvalues per decade, in BINS bins between the logarithms (base 10) low and high, the last DECADES of
    them. cut: where the tail begins; share: of the eigenvalues in it. alpha None: no tail was fitted.
    """

    layer: Layer
    low: float
    high: float
    density: tuple[float, ...]
    alpha: float | None
    cut: float
    share: float


def view_of(layer: Layer, tail: LayerTail) -> SpectrumView:
    """The histogram of a layer's eigenvalues, zeros left out, and its fit; of several spectra (a convolution's) all together."""
    values = torch.cat([torch.zeros(0), *(part.flatten().double().cpu() for part in tail.spectra)])
    logs = values[values > 1e-10 * values.max()].log10() if values.numel() else values
    if not logs.numel():
        return SpectrumView(layer, 0.0, 0.0, (), None, 0.0, 0.0)
    high = float(logs.max())
    low = min(max(float(logs.min()), high - DECADES), high - 0.1)
    counts = torch.histc(logs, BINS, low, high)
    cuts = sorted(fit.cut for fit in tail.fits)
    share = sum(fit.tail for fit in tail.fits) / max(1, sum(fit.count for fit in tail.fits))
    density = counts / len(logs) * BINS / (high - low)
    return SpectrumView(
        layer, low, high, tuple(density.tolist()), tail.alpha, cuts[len(cuts) // 2] if cuts else 0.0, share
    )


def plot_spectra(views: Sequence[SpectrumView], path: str | Path, title: str = "") -> Path:
    """Draw alpha of every layer as a map (role by block), and below it spectra with their fits: a row per block, a column per role.

    Of many blocks some are drawn, from the first to the last at even distances. Writes a PNG, replacing `path`. Raises ConfigError if
    no layer has a spectrum, MissingExtra without matplotlib, OutputError if it cannot be written.
    """
    if not any(view.density for view in views):
        raise ConfigError(
            "plot_spectra: none of the layers has a spectrum. Compute them: layer_tails(..., spectra=True)."
        )
    homes = list(dict.fromkeys(view.layer.block or view.layer.name for view in views))
    names = labels([view.layer for view in views])
    at = {(view.layer.block or view.layer.name, name): view for view, name in zip(views, names, strict=True)}
    roles = list(dict.fromkeys(names))
    rows = _spread([home for home in homes if any((home, role) in at for role in roles)], MOST_BLOCKS)
    columns = roles[:MOST_ROLES]
    high = 1.0 + 0.24 * len(roles)
    figure = new_figure(max(7.5, 1.75 * len(columns) + 0.8), high + 1.45 * len(rows) + 1.1)
    top, bottom = figure.subfigures(2, 1, height_ratios=(high + 0.3, 1.45 * len(rows) + 0.8))
    _map(top, at, homes, roles)
    panels = bottom.subplots(len(rows), len(columns), sharex="col", sharey=True, squeeze=False)
    shown = dict(zip(homes, short_names(homes), strict=True))
    for line, home in zip(panels, rows, strict=True):
        for panel, role in zip(line, columns, strict=True):
            _panel(panel, at.get((home, role)))
        line[0].set_ylabel(f"block {shown[home]}" if "." not in shown[home] else shown[home], fontsize=8)
    for panel, role in zip(panels[0], columns, strict=True):
        panel.set_title(role, fontsize=9, fontweight="bold")
    left_out = f"; {len(roles) - len(columns)} more roles only above" if len(roles) > len(columns) else ""
    some = f"{len(rows)} of {len(homes)} blocks" if len(rows) < len(homes) else "every block"
    bottom.supxlabel(
        f"eigenvalue (the largest {DECADES:g} decades), share of eigenvalues per decade; {some}{left_out}."
        " Line: the power law of the tail, from where it begins.",
        fontsize=8,
    )
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return write_png(figure, Path(path))


def _map(figure: Any, at: dict[tuple[str, str], SpectrumView], homes: Sequence[str], roles: Sequence[str]) -> None:
    """Alpha as colour, its number written in where there is room."""
    alphas = [[_alpha(at.get((home, role))) for home in homes] for role in roles]
    known = sorted(alpha for line in alphas for alpha in line if not math.isnan(alpha))
    panel = figure.subplots()
    panel.set_title("alpha of every layer: small = heavy tail = keep more", fontsize=9, loc="left")
    if known:  # a few outliers must not take all the colours
        low, high = known[len(known) // 20], known[-1 - len(known) // 20]
        image = panel.imshow(alphas, aspect="auto", cmap="cividis", vmin=low, vmax=max(high, low + 1e-9))
        figure.colorbar(image, ax=panel, extend="both", pad=0.01, aspect=12).ax.tick_params(labelsize=7)
        if len(homes) <= 16:
            for row, line in enumerate(alphas):
                for column, alpha in enumerate(line):
                    if not math.isnan(alpha):
                        bright = alpha > (low + high) / 2
                        panel.text(
                            column,
                            row,
                            f"{alpha:.1f}",
                            ha="center",
                            va="center",
                            fontsize=7,
                            color="black" if bright else "white",
                        )
    panel.set_yticks(range(len(roles)), roles, fontsize=8)
    step = math.ceil(len(homes) / 16)
    panel.set_xticks(range(0, len(homes), step), short_names(homes)[::step], fontsize=8)
    panel.set_xlabel("block, in the order of the model", fontsize=8)
    panel.tick_params(length=0)


def _panel(panel: Any, view: SpectrumView | None) -> None:
    """One spectrum, both axes logarithmic, with its tail."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.tick_params(labelsize=6, length=2, which="both")
    if view is None or not view.density:
        panel.text(0.5, 0.5, "–", ha="center", va="center", transform=panel.transAxes, color="#888888")
        return
    width = (view.high - view.low) / BINS
    edges = [10 ** (view.low + index * width) for index in range(BINS + 1)]
    panel.stairs(view.density, edges, fill=True, color=_SPECTRUM, alpha=0.35, linewidth=0)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(4e-3, 6)
    text = "no alpha"
    if view.alpha is not None:
        text = f"α {view.alpha:.2f}"
        ends = [view.cut, 10**view.high]
        start = view.share * (view.alpha - 1) * math.log(10)  # of the law's density, per decade
        panel.plot(ends, [start * (end / view.cut) ** (1 - view.alpha) for end in ends], color=_TAIL, linewidth=1.4)
        panel.axvline(view.cut, color=_TAIL, linewidth=0.7, linestyle=(0, (3, 3)))
    panel.text(0.04, 0.94, text, ha="left", va="top", transform=panel.transAxes, fontsize=7)


def _alpha(view: SpectrumView | None) -> float:
    return math.nan if view is None or view.alpha is None else view.alpha


def _spread(homes: Sequence[str], most: int) -> list[str]:
    """At most so many, from the first to the last at even distances."""
    if len(homes) <= most:
        return list(homes)
    return [homes[round(index * (len(homes) - 1) / (most - 1))] for index in range(most)]
