"""`layerwise compress` where a solver changes weights: the walk, the saved folder, and what is said of both."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from .inputs import ModelChoice, protocol_line
from .planning import tried_of
from .running import bar_of, show_notes
from .screen import Screen, table

if TYPE_CHECKING:
    from torch import nn

    from ..engine import BlockTuned, Result, Settings, Work
    from ..io import Saved, Target
    from ..methods import KVSearch, Search
    from ..plan import Plan
    from ..recover import Reconstruction
    from ..solvers import Solver
    from ..tasks import Batches


@dataclass(frozen=True)
class SolveJob:
    """Everything that is decided before work begins."""

    choice: ModelChoice
    model: "nn.Module"
    plan: "Plan"
    solver: "Solver"
    data: "Batches | None"
    settings: "Settings"
    work: "Work"
    stream: bool
    target: "Target"
    dense: bool
    tuner: "Reconstruction | None"

    def run(self, screen: Screen) -> "Result":
        """The walk."""
        from ..engine import compress as run

        with screen.task(f"Compressing with {self.solver.name}") as step:
            return run(
                self.model,
                self.plan,
                solver=self.solver,
                data=self.data,
                settings=self.settings,
                progress=bar_of(step, screen, self.work),
                tuner=self.tuner,
            )

    def save(self, output: Path, force: bool, result: "Result", screen: Screen) -> "Saved":
        """The folder, loaded back in a fresh process before it appears (streamed: read back shard by shard)."""
        from ..errors import ModelError
        from ..io import load_image_processor, load_tokenizer, save, save_whole_streamed

        measured: dict[str, Any] = {"sparsity": result.sparsity, "seconds": result.seconds, "calibration": result.data}
        if result.codes or result.factors:
            measured |= {"bits": result.bits, "nominal_bits": result.nominal_bits, "model_bits": result.model_bits}
        if self.tuner is not None:
            blocks = [asdict(one) for one in result.tuned]
            measured["reconstruction"] = {**self.tuner.facts(), "blocks": blocks}
        with screen.task(f"Saving to {output} and loading it back"):
            more: dict[str, Any] = {
                "plan": self.plan,
                "result": measured,
                "force": force,
                "dense": self.choice.folder,
                "codes": result.codes,
                "factors": {} if self.dense else result.factors,
                "target": self.target,
            }
            if self.stream:
                return save_whole_streamed(self.model, output, **more)
            try:
                tokenizer = load_tokenizer(self.choice.name, remote_code=self.choice.remote_code)
            except ModelError:  # not every model has one
                tokenizer = None
            processor = load_image_processor(self.choice.name, remote_code=self.choice.remote_code)
            return save(self.model, output, tokenizer=tokenizer, processor=processor, **more)


def show_solved(
    job: SolveJob, result: "Result", saved: "Saved", search: "Search | KVSearch | None", screen: Screen
) -> None:
    """What came of it: a table, and as JSON."""
    show_notes(result.notes, screen)
    seconds = result.seconds
    rows = table("", "", left=2)
    rows.show_header = False
    pruned = sum(layer.pruned for layer in result.layers)
    if result.size and (pruned or not (result.codes or result.factors)):
        count = f"{result.zeros:,} of {result.size:,} weights ({result.sparsity:.4%}), {pruned} layers"
        rows.add_row("pruned", f"{count}; the plan keeps {result.kept:,} in other layers" if result.kept else count)
    if result.codes:
        bits = f"{result.bits:.3f} bits per weight with scales and zeros, {result.nominal_bits:.3f} without"
        if saved.report.widened and saved.report.packed:
            bits += f" (stored in {saved.report.packed.bits:.3f}, see below)"
        rows.add_row("quantized", f"{len(result.codes)} layers to {bits}; the whole model {result.model_bits:.3f}")
    if result.factors:
        bits = f"{result.bits:.3f} bits per weight with positions and factors; the whole model {result.model_bits:.3f}"
        said = f"multiplied out and saved dense; in factors they would take {bits}" if job.dense else f"to {bits}"
        rows.add_row("factorized", f"{len(result.factors)} layers {said}")
    rows.add_row("method", f"{job.plan.method.get('name', 'plan')}, solver {job.solver.name}")
    if result.tuned:
        rows.add_row("tuned", _tuned_line(result.tuned))
    if job.data is not None:
        rows.add_row("data", escape(protocol_line(job.data)))
    parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in seconds if part != "total")
    rows.add_row("seconds", f"{seconds['total']:.1f} ({parts})")
    screen.show(f"[bold]{escape(str(saved.folder))}[/]", rows, *saved.lines())
    screen.show_json(
        {
            "output": str(saved.folder),
            "plan": job.plan.to_dict(),
            **tried_of(search),
            "result": saved.report.as_stored(result.to_dict()),
            "saved": {
                "bytes": saved.report.bytes,
                "before": saved.report.before,
                "zeros": saved.report.zeros,
                "values": saved.report.values,
                "packed": saved.report.packed.to_dict() if saved.report.packed else None,
                "factored": saved.report.factored.to_dict() if saved.report.factored else None,
                "notes": list(saved.report.notes),
                "widened": dict(saved.report.widened),
                "verified": saved.verified is not None,
            },
        }
    )


def _tuned_line(tuned: "Sequence[BlockTuned]") -> str:
    """How far blocks are from the dense ones before and after, as the mean over them; and how many no step helped."""
    before, after = (sum(getattr(one, which) for one in tuned) / len(tuned) for which in ("before", "after"))
    left = sum(1 for one in tuned if one.note)
    said = f"; {left} left as they were solved" if left else ""
    return f"{len(tuned)} blocks: error {before:.4f} to {after:.4f} of the output's energy, on batches held out{said}"
