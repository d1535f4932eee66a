"""`layerwise recover`: train a compressed model with its zeros held, beside the dense one, and say what came back."""

import json as plain_json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...errors import ConfigError, ModelError
from .. import options
from .. import recover_options as own
from ..given import check_png, refuse
from ..inputs import DataChoice, ModelChoice
from ..recover_tables import SavedApart, measured, show
from ..running import Stopped
from ..screen import Screen
from ..settings import device_of, dtype_of
from ..training_data import TrainingData

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...recover import Recovered, Recovery
    from ...tasks import Batches

LENGTH = 512  # tokens in a window, where the model's own limit is not less
MINUTES = 10.0
LR = {None: 3e-4, "hira": 1e-2, "shira": 3e-3, "masked-lora": 3e-3}  # by adapter


def recover(
    context: typer.Context,
    model: own.Model,
    teacher: own.Teacher = None,
    minutes: own.Minutes = None,
    steps: own.Steps = None,
    lr: own.Lr = None,
    adapter: own.AdapterKind = None,
    rank: own.Rank = 32,
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
    from ...recover.dtypes import cast

    screen = Screen(json=json, quiet=quiet)
    if teacher is None:
        refuse(context, "since there is no --teacher to learn from", "alpha", "temperature", "hidden")
    if adapter is None:
        refuse(context, "since it goes with --adapter", "rank")
    settings = Recovery(
        minutes=minutes if minutes is not None or steps is not None else MINUTES,
        steps=steps,
        lr=LR.get(adapter, 3e-4) if lr is None else lr,
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
    _check(choice, dense, adapter)
    check_png(plot, force)
    target = output or choice.folder.with_name(f"{choice.folder.name}-recovered")
    apart = bool(choice.config.get("quantization_config"))  # of a quantized base only the adapter is saved
    check_output(target, force=force, needed=0 if apart else choice.bytes)
    where = device_of(device)
    source = data or ("python-docs" if "demo" in (model, teacher) else None)
    asked = DataChoice(
        source, samples, None if choice.sees else length or min(LENGTH, choice.length(None)), batch, seed
    )
    vocabulary = None if dense is None or choice.sees else _vocabulary(choice, dense)
    train, judged = TrainingData(asked, held_out).read(choice, screen)
    folder = work or target.with_name(f"{target.name}.work")
    job = _Job(settings, choice, dense, vocabulary, train, judged, folder, adapter, rank, apart)
    loaded = choice.load(screen)
    taught = None if dense is None else dense.load(screen).to(where)
    loaded.to(where)
    beside = taught if vocabulary is None else None  # predictions over tables of two sizes have no divergence
    before = measured(loaded, judged, beside, where, screen, "Measuring the model as it is")
    result = job.run(loaded, taught, screen)
    loaded.to("cpu")
    stored = dtype_of(str(choice.config.get("dtype") or choice.config.get("torch_dtype") or "float32"))
    if not apart and stored is not None:
        cast(loaded, stored)
    after = measured(loaded, judged, beside, where, screen, "Measuring it afterwards")
    loaded.to("cpu")
    saved = job.save(loaded, target, force, result, screen)
    if plot is not None:
        from ...report import plot_losses

        plot_losses(result.history, plot)
    job.clear()
    show(job.train, job.judged, result, saved, before, after, plot, screen)


def _check(choice: ModelChoice, dense: ModelChoice | None, adapter: str | None) -> None:
    """Raise what can be known before anything is loaded."""
    from ...recover import ADAPTERS

    _ = choice.bytes
    if adapter is not None and adapter not in ADAPTERS:
        raise ConfigError(f'--adapter "{adapter}": give {", ".join(ADAPTERS[:-1])} or {ADAPTERS[-1]}.')
    if choice.config.get("quantization_config") and adapter is None:
        raise ModelError(
            f'model "{choice.name}" is quantized: training its weights would take them off their grid. Train an adapter beside it'
            " (--adapter hira), or recover before quantizing."
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
    adapter: str | None
    rank: int
    apart: bool

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
        from ...recover import add_adapter, merge_adapter

        keep = None
        if self.adapter is not None:
            add_adapter(model, self.adapter, self.rank, seed=self.settings.seed)
        elif (keep := self.masks(model)) is None:
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
                result = self.settings.train(
                    model, self.train, self.judged, teacher=teacher, keep=keep, work=self.work, vocabulary=self.vocabulary,
                    facts=facts, progress=moved,
                )  # fmt: skip
            except KeyboardInterrupt as error:
                raise Stopped(f"stopped. Run the same command again to go on from {self.work}.") from error
        if self.adapter is not None and not self.apart:
            merge_adapter(model)
        return result

    def save(self, model: "nn.Module", target: Path, force: bool, result: "Recovered", screen: Screen) -> Any:
        """The folder, with what compression and recovery measured."""
        from ...io import load_image_processor, load_tokenizer, save
        from ...plan import Plan

        if self.apart:
            return SavedApart(self.save_adapter(model, target, force, result), self.choice.name)
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

    def save_adapter(self, model: "nn.Module", target: Path, force: bool, result: "Recovered") -> Path:
        """The folder of the adapter alone, whole or not at all."""
        from ...io import check_output
        from ...io.whole import whole_folder
        from ...recover import save_adapter

        with whole_folder(check_output(target, force=force), force=force) as partial:
            save_adapter(model, partial)
            facts = {"base": self.choice.name, "recovery": self.record(result)}
            (partial / "recovery.json").write_text(
                plain_json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8"
            )
        return target

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
            "adapter": None if self.adapter is None else {"kind": self.adapter, "rank": self.rank},
            "teacher": None if self.dense is None else self.dense.name,
            "data": dict(self.train.protocol),
            "judged on": dict(self.judged.protocol),
            **figures,
        }

    def clear(self) -> None:
        from ...recover.recovery import clear

        clear(self.work)
