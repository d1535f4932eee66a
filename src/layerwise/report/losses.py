"""The losses of a training run as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from .plots import COLOURS, new_figure, write_png


def plot_losses(history: Sequence[tuple[int, float, float | None, float]], path: str | Path) -> Path:
    """Held-out and training loss by step, the best state marked. history: that of `recover.Recovered`. Writes a PNG, replacing `path`.

    Raises MissingExtra without matplotlib, OutputError if it cannot be written.
    """
    figure = new_figure(7.5, 3.6)
    panel = figure.subplots()
    known = [(step, value) for step, _, _, value in history if math.isfinite(value)]
    trained = [(step, value) for step, _, value, _ in history if value is not None]
    panel.plot(*zip(*known, strict=True), color=COLOURS[0], marker="o", markersize=4, label="held-out loss")
    if trained:
        panel.plot(
            *zip(*trained, strict=True), color=COLOURS[1], linewidth=1, label="training loss (mean since the last look)"
        )
    step, value = min(known, key=lambda entry: entry[1])
    panel.plot(
        [step],
        [value],
        color=COLOURS[2],
        marker="*",
        markersize=12,
        linestyle="",
        label=f"kept: step {step}, {value:.3f}",
    )
    panel.set_xlabel("step")
    panel.set_ylabel("nats")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return write_png(figure, Path(path))
