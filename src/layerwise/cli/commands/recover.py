"""`layerwise recover`: train a compressed model with its zeros held, beside the dense one, and say what came back."""

import json as plain_json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from ...errors import ConfigError, LayerwiseError, ModelError
from .. import options
from .. import recover_options as own
from ..given import check_png, refuse
from ..inputs import DataChoice, ModelChoice, protocol_line
from ..running import Stopped
from ..screen import Screen, table
from ..settings import device_of, dtype_of
from ..training_data import TrainingData

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...recover import Recovered, Recovery
    from ...tasks import Batches

LENGTH = 512  # tokens in a window, where the model's own limit is not less
MINUTES = 10.0


def recover(
    context: typer.Context,
    model: own.Model,
    teacher: own.Teacher = None,
    minutes: own.Minutes = None,
    steps: own.Steps = None,
    lr: own.Lr = 3e-4,
    accumulate: own.Accumulate = 1,
    alpha: own.Alpha = 0.5,
    temperature: own.Temperature = 1.0,
    hidden: own.Hidden = 0.0,
    patience: own.Patience = 3,
    data: options.Data = None,
    held_out: own.HeldOut = None,
    samples: own.Samples = 2048,
    length: own.Length = None,
    batch: own.Batch = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    precision: own.Precision = "float32",
    gradient_checkpointing: own.GradientCheckpointing = False,
    work: options.Work = None,
    remote_code: options.RemoteCode = False,
    output: own.Out = None,
    plot: own.Plot = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a compressed model for a while, its zeros held at zero, and save it in its best state. Killed and started again, it goes on.

    [dim]Example:[/]  layerwise recover out --teacher demo --minutes 10
    [dim]Your text:[/]  layerwise recover out --teacher MODEL --data text.jsonl --minutes 30 -o better
    """
    from ...io import check_output
    from ...recover import Recovery

    screen = Screen(json=json, quiet=quiet)
    if teacher is None:
        refuse(context, "since there is no --teacher to learn from", "alpha", "temperature", "hidden")
    settings = Recovery(
        minutes=minutes if minutes is not None or steps is not None else MINUTES,
        steps=steps,
        lr=lr,
        accumulate=accumulate,
        alpha=alpha,
        temperature=temperature,
        hidden=hidden,
        patience=patience,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    choice = ModelChoice(model, "float32", remote_code=remote_code)  # small steps are lost in bfloat16 weights
    dense = None if teacher is None else ModelChoice(teacher, remote_code=remote_code)
    _check(choice, dense)
    check_png(plot, force)
    target = output or choice.folder.with_name(f"{choice.folder.name}-recovered")
    check_output(target, force=force, needed=choice.bytes)
    where = device_of(device)
    source = data or ("python-docs" if "demo" in (model, teacher) else None)
    asked = DataChoice(
        source, samples, None if choice.sees else length or min(LENGTH, choice.length(None)), batch, seed
    )
    vocabulary = None if dense is None or choice.sees else _vocabulary(choice, dense)
    train, judged = TrainingData(asked, held_out).read(choice, screen)
    job = _Job(settings, choice, dense, vocabulary, train, judged, work or target.with_name(f"{target.name}.work"))
    loaded = choice.load(screen)
    taught = None if dense is None else dense.load(screen).to(where)
    loaded.to(where)
    beside = taught if vocabulary is None else None  # predictions over tables of two sizes have no divergence
    before = _measured(loaded, judged, beside, where, screen, "Measuring the model as it is")
    result = job.run(loaded, taught, screen)
    stored = dtype_of(str(choice.config.get("dtype") or choice.config.get("torch_dtype") or "float32"))
    loaded.to("cpu", dtype=stored if not isinstance(stored, str) else None)
    after = _measured(loaded, judged, beside, where, screen, "Measuring it afterwards")
    loaded.to("cpu")
    saved = job.save(loaded, target, force, result, screen)
    if plot is not None:
        from ...report import plot_losses

        plot_losses(result.history, plot)
    job.clear()
    _show(job, result, saved, before, after, plot, screen)


def _check(choice: ModelChoice, dense: ModelChoice | None) -> None:
    """Raise what can be known before anything is loaded."""
    _ = choice.bytes
    if choice.config.get("quantization_config"):
        raise ModelError(
            f'model "{choice.name}" is quantized: training its weights would take them off their grid. Train an adapter beside it'
            " (layerwise.recover.add_adapter), or recover before quantizing."
        )
    if dense is None:
        return
    _ = dense.bytes
    if dense.folder.resolve() == choice.folder.resolve():
        raise ConfigError("--teacher: this is the model that is trained. Give the dense one.")
    if dense.kind != choice.kind:
        raise ModelError(
            f'teacher "{dense.name}" is of {dense.kind}, "{choice.name}" of {choice.kind}: give its dense model.'
        )


def _vocabulary(choice: ModelChoice, dense: ModelChoice) -> int | None:
    """Words that student and teacher share, None where their tables have one size. Raises ModelError where their tokenizers differ."""
    from ...io import load_tokenizer
    from ...tasks.text import tokenizer_hash

    ours, theirs = (load_tokenizer(one.name, remote_code=one.remote_code) for one in (choice, dense))
    if tokenizer_hash(ours) != tokenizer_hash(theirs):
        raise ModelError(
            f'teacher "{dense.name}" has another tokenizer than "{choice.name}": its predictions are of other words. Give a teacher of'
            " the same vocabulary, or none."
        )
    sizes = [(one.config.get("text_config") or one.config).get("vocab_size") for one in (choice, dense)]
    return None if sizes[0] == sizes[1] else min(len(ours), *(size for size in sizes if isinstance(size, int)))


@dataclass(frozen=True)
class _Job:
    """Everything that is decided before work begins."""

    settings: "Recovery"
    choice: ModelChoice
    dense: ModelChoice | None
    vocabulary: int | None  # words that both know, where their tables differ in size
    train: "Batches"
    judged: "Batches"
    work: Path

    def masks(self, model: "nn.Module") -> "dict[str, Tensor] | None":
        """Of what is zero in its matrices; None of a model without zeros."""
        from ...errors import DataError
        from ...recover import masks_of

        try:
            return masks_of(model)
        except DataError:
            return None

    def run(self, model: "nn.Module", teacher: "nn.Module | None", screen: Screen) -> "Recovered":
        """Train; the bar shows the share of the run. An interrupt says how to go on."""
        keep = self.masks(model)
        if keep is None:
            screen.say("note: no matrix has zeros, so no masks are held.", style="yellow")
        facts = {"model name": self.choice.name, "teacher name": self.dense and self.dense.name}
        with screen.task("Recovering") as step:

            def moved(moment: Any) -> None:
                step(
                    round(1000 * moment.share),
                    1000,
                    f"step {moment.step}, loss {moment.loss:.3f}, held-out {moment.held_out:.3f}",
                )

            try:
                return self.settings.train(
                    model, self.train, self.judged, teacher=teacher, keep=keep, work=self.work, vocabulary=self.vocabulary,
                    facts=facts, progress=moved,
                )  # fmt: skip
            except KeyboardInterrupt as error:
                raise Stopped(f"stopped. Run the same command again to go on from {self.work}.") from error

    def save(self, model: "nn.Module", target: Path, force: bool, result: "Recovered", screen: Screen) -> Any:
        """The folder, with what compression and recovery measured."""
        from ...io import load_image_processor, load_tokenizer, save
        from ...plan import Plan

        plan = self.choice.folder / "plan.yaml"
        with screen.task(f"Saving to {target} and loading it back"):
            try:
                tokenizer = load_tokenizer(self.choice.name, remote_code=self.choice.remote_code)
            except ModelError:  # not every model has one
                tokenizer = None
            return save(
                model,
                target,
                tokenizer=tokenizer,
                processor=load_image_processor(self.choice.name, remote_code=self.choice.remote_code),
                plan=Plan.load(plan) if plan.is_file() else None,
                result={**self._before(), "recovery": self.record(result)},
                force=force,
                dense=self.choice.folder,
            )

    def _before(self) -> dict[str, Any]:
        """What layerwise.json of the compressed model says was measured."""
        try:
            facts = plain_json.loads((self.choice.folder / "layerwise.json").read_text(encoding="utf-8"))
            return dict(facts.get("result") or {})
        except (OSError, ValueError, TypeError):
            return {}

    def record(self, result: "Recovered") -> dict[str, Any]:
        """For layerwise.json: settings, data, losses."""
        figures = {name: value for name, value in result.to_dict().items() if name != "history"}
        return {
            "settings": asdict(self.settings),
            "teacher": None if self.dense is None else self.dense.name,
            "data": dict(self.train.protocol),
            "judged on": dict(self.judged.protocol),
            **figures,
        }

    def clear(self) -> None:
        from ...recover.recovery import clear

        clear(self.work)


def _measured(
    model: "nn.Module",
    judged: "Batches",
    teacher: "nn.Module | None",
    device: "torch.device",
    screen: Screen,
    title: str,
) -> dict[str, float | None]:
    """Perplexity (accuracy of a classifier) and distance from the teacher on the held-out data, and the share of zeros."""
    from ...evaluate import accuracy, evaluate

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


def _show(
    job: _Job,
    result: "Recovered",
    saved: Any,
    before: dict[str, Any],
    after: dict[str, Any],
    plot: Path | None,
    screen: Screen,
) -> None:
    from ...report import bar_chart

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
        f"[dim]trained on: {escape(protocol_line(job.train))}[/]",
        f"[dim]measured on: {escape(protocol_line(job.judged))}[/]",
        *([f"[dim]losses drawn in {escape(str(plot))}[/]"] if plot is not None else []),
        *saved.lines(),
    )
    screen.show_json(
        {"output": str(saved.folder), "before": before, "after": after, "recovery": result.to_dict(), "plot": plot}
    )
