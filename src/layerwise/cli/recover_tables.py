"""What `layerwise recover` measures and shows: before and after, the losses, what was saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import LayerwiseError
from .inputs import protocol_line
from .screen import Screen, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recover import Recovered
    from ..tasks import Batches


@dataclass(frozen=True)
class SavedApart:
    """An adapter's folder, as the report wants it."""

    folder: Path
    base: str

    def lines(self) -> list[str]:
        """What it is, and how it is loaded."""
        return [
            f"The adapter alone, for {escape(self.base)}: merged weights would leave its grid.",
            f'In Python: load_adapter(layerwise.load("{escape(self.base)}", dtype="float32"), "{escape(str(self.folder))}").',
        ]


def measured(
    model: "nn.Module",
    judged: "Batches",
    teacher: "nn.Module | None",
    device: "torch.device",
    screen: Screen,
    title: str,
) -> dict[str, float | None]:
    """Perplexity (accuracy of a classifier) and distance from the teacher on the held-out data, and the share of zeros."""
    from ..evaluate import accuracy, evaluate

    sees = "pixel_values" in judged[0]
    with screen.task(title) as step:
        if sees:
            seen = accuracy(model, judged, against=teacher, device=device, progress=step)
            figures = {"accuracy": seen.top1, "same": seen.agreement}
        else:
            found = evaluate(model, judged, against=teacher, device=device, progress=step)
            figures = {
                "perplexity": found.perplexity,
                "kl": found.kl,
                "same": found.top1,
                "dense": found.dense_perplexity,
            }
    matrices = [one for one in model.parameters() if one.ndim > 1]
    zeros = sum(one.numel() - int(one.count_nonzero()) for one in matrices)
    return {**figures, "zeros": zeros / max(1, sum(one.numel() for one in matrices))}


def show(
    train: "Batches",
    judged: "Batches",
    result: "Recovered",
    saved: Any,
    before: dict[str, Any],
    after: dict[str, Any],
    plot: Path | None,
    screen: Screen,
) -> None:
    """The table of before and after, the losses as bars, what it was trained and measured on, and what was saved."""
    from ..report import bar_chart

    if result.leaked:
        raise LayerwiseError(
            f"{result.leaked} pruned weights are not zero after training: this is a fault, please report it."
        )
    sees = "accuracy" in before
    rows = table("", "accuracy" if sees else "perplexity", *(() if sees else ("KL (nats)",)), "same choice", "zeros")
    if before.get("dense") is not None:
        rows.add_row("dense", f"{before['dense']:.3f}", "0.0000", "100.00%", "")
    for name, figures in (("before", before), ("after", after)):
        same = "–" if figures["same"] is None else f"{figures['same']:.2%}"
        kl = () if sees else ("–" if figures["kl"] is None else f"{figures['kl']:.4f}",)
        first = f"{figures['accuracy']:.2%}" if sees else f"{figures['perplexity']:.3f}"
        rows.add_row(name, first, *kl, same, f"{figures['zeros']:.2%}")
    losses = {f"step {step}": value for step, _, _, value in result.history if value < float("inf")}
    went = f"{result.steps} steps in {result.seconds:.0f} s; ended since {result.why}; best at step {result.best}"
    screen.show(
        f"[bold]{escape(str(saved.folder))}[/]",
        rows,
        "\n[dim]held-out loss[/]",
        bar_chart(losses, min(72, screen.out.width)),
        f"\n[dim]{went}{f'; gone on from step {result.resumed}' if result.resumed else ''}[/]",
        f"[dim]trained on: {escape(protocol_line(train))}[/]",
        f"[dim]measured on: {escape(protocol_line(judged))}[/]",
        *([f"[dim]losses drawn in {escape(str(plot))}[/]"] if plot is not None else []),
        *saved.lines(),
    )
    screen.show_json(
        {"output": str(saved.folder), "before": before, "after": after, "recovery": result.to_dict(), "plot": plot}
    )
