"""`layerwise compress` where heads, channels or blocks are cut: plan, cut, save, check what was saved."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import ConfigError
from .inputs import DataChoice, ModelChoice, protocol_line
from .planning import make_plan, with_facts
from .running import show_notes
from .screen import Screen, table
from .settings import device_of

if TYPE_CHECKING:
    from torch import nn

    from ..io import Saved
    from ..plan import Plan
    from ..shrink import Applied
    from ..structure import Structure
    from ..tasks import Batches
    from .narrow_training import Training

SOLVING = ("solver", "solver_set", "for_", "dense", "reconstruct", "propagate", "stream", "spill", "work")


def reshapes(plan: "Plan") -> bool:
    """Whether a plan cuts heads or channels or drops blocks."""
    return any(one.resize or one.drop for one in plan.layers.values())


@dataclass(frozen=True)
class NarrowJob:
    """A method or a plan, and where the result goes. draw: data, samples, length and batch as asked for."""

    choice: ModelChoice
    method: Any
    given: "Plan | None"
    output: Path
    force: bool
    seed: int
    device: str
    draw: tuple[str | None, int, int | None, int | None]
    minutes: float | None = None  # of training
    stages: int = 1
    uniform: int | None = None  # one width for all blocks, a multiple of this
    mode: Any = "auto"  # of saving

    def run(self, screen: Screen) -> None:
        """From the words to the folder. Raises what planning, cutting and saving raise."""
        from ..io import check_output
        from ..recover.dtypes import cast
        from ..scores.unit_costs import forward_time
        from ..shrink import Applied, apply

        check_output(self.output, force=self.force, needed=self.choice.bytes)
        if self.mode not in ("auto", "remote-code"):
            raise ConfigError(f'--save-as "{self.mode}": give auto or remote-code.')
        if self.stages > 1 and self.uniform is not None:
            raise ConfigError(
                "--stages and --uniform-width: a stage keeps what the one before it left. Give one of them."
            )
        if self.stages > 1 and (self.method is None or self.method.name != "adapt-pruner"):
            raise ConfigError("--stages: cutting and training in turn is Adapt-Pruner's: --method adapt-pruner.")
        drawn = self._data(screen)
        training = None if self.minutes is None else self._training(screen)
        where = device_of(self.device)
        model = self.choice.load(screen)
        stored = next(model.parameters()).dtype
        structure = self.choice.structure(model)
        model.to(where)
        trained: dict[str, Any] = {}
        if training is not None and self.stages > 1:
            done = training.in_turn(model, self.choice, self.method, drawn, self.stages, screen)
            plan, trained = (
                with_facts(done.plan, self.choice, structure),
                {"stages": [asdict(one) for one in done.stages]},
            )
            applied = Applied(structure.parameters, done.stages[-1].parameters, (), ())
            show_notes(plan.notes, screen)
        else:
            plan = self._plan(model, structure, drawn, screen)
            rows_of_time = int(plan.method.get("rows", 1)) if plan.method.get("budget") == "latency" else 0
            before = forward_time(model, rows_of_time) if rows_of_time else 0.0
            with screen.task("Cutting"):
                applied = apply(model, plan, drawn)
            if rows_of_time:
                applied = replace(
                    applied, notes=(*applied.notes, _timed(before, forward_time(model, rows_of_time), plan))
                )
            if training is not None:
                found = training.after(model, self.choice, screen)
                trained = {"before": found.before, "after": found.after, "steps": found.steps, "seconds": found.seconds}
        model.to("cpu")
        if next(model.parameters()).dtype != stored:
            cast(model, stored)
        show_notes(applied.notes, screen)
        saved = self._save(model, plan, applied, drawn, trained, screen)
        if training is not None:
            training.clear()
        self._show(plan, applied, drawn, saved, trained, screen)

    def _plan(self, model: "nn.Module", structure: "Structure", drawn: "Batches | None", screen: Screen) -> "Plan":
        from ..shrink import uniform_widths

        if self.given is None:
            plan = make_plan(self.method, self.choice, model, structure, drawn, screen)[0]
        else:
            show_notes(self.given.notes, screen)
            plan = self.given if self.given.model is not None else with_facts(self.given, self.choice, structure)
        if self.uniform is not None:
            plan = uniform_widths(model, plan, multiple_of=self.uniform)
            show_notes(plan.notes[-1:], screen)
        return plan

    def _training(self, screen: Screen) -> "Training":
        from .narrow_training import Training

        source = self.draw[0] or ("python-docs" if self.choice.name == "demo" else None)
        work = self.output.with_name(f"{self.output.name}.work")
        return Training.read(self.choice, source, self.draw[2], self.minutes or 0.0, self.seed, work, screen)

    def _data(self, screen: Screen) -> "Batches | None":
        """Calibration data where the method looks at it, or the plan puts means in the place of what goes."""
        settings = (
            self.given.method if self.given is not None else {"compensate": getattr(self.method, "compensate", False)}
        )
        if not settings.get("compensate") and not (self.method is not None and self.method.needs_data):
            return None
        return DataChoice(*self.draw, self.seed).draw(self.choice, screen)

    def _save(
        self,
        model: "nn.Module",
        plan: "Plan",
        applied: "Applied",
        drawn: "Batches | None",
        trained: dict[str, Any],
        screen: Screen,
    ) -> "Saved":
        from ..errors import ModelError
        from ..io import load_image_processor, load_tokenizer, save

        measured: dict[str, Any] = {
            "parameters": {"before": applied.before, "after": applied.after},
            "calibration": None if drawn is None else {**drawn.protocol, "hash": drawn.hash},
        }
        measured |= {"recovery": trained} if trained else {}
        with screen.task(f"Saving to {self.output} and loading it back"):
            try:
                tokenizer = load_tokenizer(self.choice.name, remote_code=self.choice.remote_code)
            except ModelError:  # not every model has one
                tokenizer = None
            processor = load_image_processor(self.choice.name, remote_code=self.choice.remote_code)
            return save(
                model, self.output, tokenizer=tokenizer, processor=processor, plan=plan, result=measured, force=self.force,
                dense=self.choice.folder, mode=self.mode,
            )  # fmt: skip

    def _show(
        self,
        plan: "Plan",
        applied: "Applied",
        drawn: "Batches | None",
        saved: "Saved",
        trained: dict[str, Any],
        screen: Screen,
    ) -> None:
        from ..io.places import read_config
        from ..shrink import is_narrow

        rows = table("", "", left=2)
        rows.show_header = False
        share = applied.after / applied.before
        rows.add_row("parameters", f"{applied.before:,} to {applied.after:,} ({share:.2%})")
        groups = [one.resize for one in plan.layers.values() if one.resize]
        if groups:
            heads = sum(1 for one in groups if one.channels is None)
            rows.add_row("narrower", f"{heads} attentions, {len(groups) - heads} MLPs")
        if applied.dropped:
            rows.add_row("dropped", f"{len(applied.dropped)} blocks")
        rows.add_row("method", str(plan.method.get("name", "plan")))
        if drawn is not None:
            rows.add_row("data", escape(protocol_line(drawn)))
        for number, stage in enumerate(trained.get("stages", [trained] if trained else []), start=1):
            size = f"{stage['parameters']:,} parameters, " if "parameters" in stage else ""
            losses = f"held-out loss {stage['before']:.3f} to {stage['after']:.3f}"
            rows.add_row(f"stage {number}" if size else "trained", f"{size}{losses}, {stage['steps']} steps")
        narrow = is_narrow(read_config(saved.folder)) if (saved.folder / "config.json").is_file() else False
        how = (
            "Widths differ by layer, as config.json says. Loads with layerwise.load, and with transformers' Auto classes by"
            " trust_remote_code=True."
            if self.mode == "remote-code"
            else "Widths differ by layer, as config.json says. Loads with layerwise.load; with transformers' Auto classes after"
            " layerwise.register()."
        )
        screen.show(
            f"[bold]{escape(str(saved.folder))}[/]",
            rows,
            *([how] if narrow else []),
            *saved.lines(),
            *(
                []
                if trained
                else [escape(f"Win quality back: layerwise recover {saved.folder} --teacher {self.choice.name}")]
            ),
        )
        screen.show_json(
            {
                "output": str(saved.folder),
                "plan": plan.to_dict(),
                "parameters": {"before": applied.before, "after": applied.after},
                "dropped": list(applied.dropped),
                "notes": list(applied.notes),
                **({"recovery": trained} if trained else {}),
                "saved": {
                    "bytes": saved.report.bytes,
                    "before": saved.report.before,
                    "verified": saved.verified is not None,
                },
            }
        )


def _timed(before: float, after: float, plan: "Plan") -> str:
    """What a forward pass takes now, beside what was asked for."""
    asked, rows = float(plan.method.get("parameters", 1.0)), plan.method.get("rows", 1)
    return (
        f"a forward pass of {rows} token(s) takes {1000 * after:.2f} ms, {1000 * before:.2f} before: {after / before:.1%}, {asked:.1%} was"
        f" asked for ({after / before - asked:+.1%})."
    )
