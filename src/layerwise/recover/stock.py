"""`Recovery` on the stock transformers Trainer: one override of `compute_loss`, and a callback that looks, keeps and ends."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import MissingExtra, TrainError
from ..files import whole_file
from ..tasks.batches import Batch
from ..tasks.losses import IGNORED, loss_of, targets_of
from ..tasks.undisturbed import quiet
from .distill import Distillation
from .held_out import HeldOut
from .masks import Masks
from .rates import cosine, wsd
from .recovery import RUN, Moment, Progress, Recovered, Recovery

FLOOR = 0.1  # of the learning rate, at the end
_CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def require_accelerate() -> None:
    """Raise MissingExtra if the stock Trainer cannot run."""
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise MissingExtra(
            "recovery runs on the stock Trainer, which needs accelerate: pip install 'layerwise[train]'."
        )


class _Rows(torch.utils.data.Dataset[Batch]):
    """Batches as items, each a batch of the Trainer."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


class LossTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """The stock Trainer with a loss of (model, batch), right under gradient accumulation and several processes.

    A loss is a mean over the predictions of its own batch; what is summed over the batches of a step counts every prediction once.
    """

    def __init__(self, *, loss: Distillation | None, **options: Any) -> None:
        super().__init__(**options)
        self.loss = loss
        self.losses: list[float] = []  # of every batch, in nats, for whoever reads and empties it
        self.model_accepts_loss_kwargs = True  # labels are counted over all batches of a step, whatever the model takes

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the predictions of the whole step. Raises TrainError for a number that is not finite."""
        value = loss_of(model, inputs) if self.loss is None else self.loss(model, inputs)
        self.losses.append(float(value.detach()))
        if not math.isfinite(self.losses[-1]):
            raise TrainError(
                f"step {self.state.global_step + 1}: the loss is {self.losses[-1]}. Lower the learning rate, or clip gradients."
            )
        own = _predictions(model, inputs)
        if num_items_in_batch is None or own is None:
            return value / self.current_gradient_accumulation_steps if num_items_in_batch is not None else value
        share = own / num_items_in_batch
        if self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes
        return value * share


def _predictions(model: nn.Module, batch: Batch) -> int | None:
    targets = targets_of(getattr(model, "module", model), batch) if "labels" in batch else None
    return None if targets is None else int((targets != IGNORED).sum())


class Stock:
    """One run: the Trainer, its folder, and what is kept of it."""

    def __init__(
        self,
        settings: Recovery,
        model: nn.Module,
        data: Sequence[Batch],
        held_out: HeldOut,
        loss: Distillation | None,
        masks: Masks | None,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self.settings, self.model, self.held_out, self.folder = settings, model, held_out, folder
        self.loss, self.masks, self.progress = loss, masks, progress
        self.rows = _Rows([_with_labels(model, batch) for batch in data])
        self.history: list[tuple[int, float, float | None, float]] = []
        self.best, self.step, self.before_seconds, self.why = 0, 0, 0.0, ""
        self.since: list[float] = []  # training losses since the last look: the Trainer's own list
        self.started = time.monotonic()

    def run(self) -> Recovered:
        """Train, and leave the model in its best state."""
        checkpoint = self._last_checkpoint()
        if checkpoint is not None:
            self._read(checkpoint)
        else:
            self._look()
        resumed = self.step
        trainer = self._trainer()
        self.since = trainer.losses
        try:
            if not self.why:  # a run that has ended has only its best state to give
                with quiet():
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except TrainError as error:
            self._take_best()
            kept = f"The weights of step {self.best} are kept"
            raise TrainError(f"{error} {kept}, and the checkpoints in {self.folder}.") from error
        self._take_best()
        return Recovered(
            before=self.history[0][3],
            after=min(entry[3] for entry in self.history),
            best=self.best,
            steps=self.history[-1][0],
            seconds=self.history[-1][1],
            why=self.why,
            history=tuple(self.history),
            resumed=resumed,
            leaked=0 if self.masks is None else self.masks.leaked(),
        )

    def share(self) -> float:
        """How much of the run is over, by steps or by the clock."""
        settings, done = self.settings, 0.0
        if settings.steps is not None:
            done = self.step / settings.steps
        if settings.minutes is not None:
            done = max(done, self.seconds() / (60 * settings.minutes))
        return min(1.0, done)

    def seconds(self) -> float:
        """Of training, those before a kill included."""
        return self.before_seconds + time.monotonic() - self.started

    def factor(self, _: int) -> float:
        """What the learning rate is multiplied by."""
        settings = self.settings
        length = settings.end - settings.begin
        done = settings.begin + length * self.share()
        if settings.warm and done < settings.warm:  # the first step is not lost
            return min(1.0, (done + length / (settings.steps or 100)) / settings.warm)
        return (
            wsd(done, settings.warm, floor=FLOOR) if settings.schedule == "wsd" else cosine(done, settings.warm, FLOOR)
        )

    def after_step(self, step: int) -> bool:
        """Told of every step; whether it is time to look, and to write a checkpoint."""
        self.step = step
        if self.progress is not None:
            self.progress(Moment(step, self.share(), self.since[-1] if self.since else math.nan, self.history[-1][3]))
        done = self.share()
        if done < 1 and done < len(self.history) / self.settings.looks:
            return False
        self._look()
        lowest = min(range(len(self.history)), key=lambda index: self.history[index][3])
        if done >= 1:
            by_steps = self.settings.steps is not None and step >= self.settings.steps
            self.why = f"{step} steps" if by_steps else f"{self.settings.minutes:g} minutes"
        elif len(self.history) - 1 - lowest >= self.settings.patience:
            self.why = f"the held-out loss has not fallen in {self.settings.patience} looks"
        return True

    def _look(self) -> None:
        """Measure, and keep the state if it is the best so far."""
        value = self.held_out.loss(self.model)
        mean = sum(self.since) / len(self.since) if self.since else None
        if not math.isfinite(value):
            value = math.inf
        better = all(value < entry[3] for entry in self.history)
        self.history.append((self.step, self.seconds(), mean, value))
        self.since.clear()
        if better:
            self.best = self.step
            path = self.folder / f"best-{self.step}.safetensors"
            with whole_file(path) as partial:
                save_file({n: p.detach().cpu().contiguous() for n, p in self._state().items()}, partial)

    def _state(self) -> dict[str, Tensor]:
        """What training changes: parameters that take gradients, and statistics such as those of batch norms; tied ones once."""
        buffers = {name: value for name, value in self.model.named_buffers() if value is not None}
        saved = set(self.model.state_dict())
        return {n: p.data for n, p in self.model.named_parameters() if p.requires_grad} | {
            name: value for name, value in buffers.items() if name in saved
        }

    def _take_best(self) -> None:
        stored = load_file(self.folder / f"best-{self.best}.safetensors")
        with torch.no_grad():
            for name, value in self._state().items():
                value.copy_(stored[name])

    def written(self, checkpoint: Path) -> None:
        """The checkpoint is whole once this is in it. The best state is one file; older ones go."""
        facts = {
            "step": self.step, "best": self.best, "history": self.history, "seconds": self.seconds(), "why": self.why,
        }  # fmt: skip
        with whole_file(checkpoint / RUN) as partial:
            partial.write_text(json.dumps(facts), encoding="utf-8")
        for old in self.folder.glob("best-*.safetensors"):
            if old.name != f"best-{self.best}.safetensors":
                old.unlink()

    def _last_checkpoint(self) -> Path | None:
        """The newest that is whole, with the best state that it knows."""
        found = [path for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / RUN).is_file()]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def _read(self, checkpoint: Path) -> None:
        facts = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
        self.step, self.best, self.why = facts["step"], facts["best"], facts["why"]
        self.history = [tuple(entry) for entry in facts["history"]]
        self.before_seconds = facts["seconds"]

    def _trainer(self) -> LossTrainer:
        settings = self.settings
        trained = [one for one in self.model.parameters() if one.requires_grad]
        groups = [
            {"params": [one for one in trained if one.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW([group for group in groups if group["params"]], lr=settings.lr)
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=settings.steps or 10**9,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.accumulate,
            max_grad_norm=settings.clip,
            bf16=settings.precision == "bfloat16",
            **(_CHECKPOINTING if settings.gradient_checkpointing else {}),
            use_cpu=next(self.model.parameters()).device.type == "cpu",
            save_strategy="no", save_total_limit=2, logging_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False, seed=settings.seed,
        )  # fmt: skip
        watch = _Watch(self)
        callbacks = [watch] if self.masks is None else [self.masks.callback(), watch]
        trainer = LossTrainer(
            loss=self.loss,
            model=self.model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=lambda items: dict(items[0]),
            optimizers=(optimizer, LambdaLR(optimizer, self.factor)),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Steps and checkpoints of the Trainer, handed on."""

    def __init__(self, run: Stock) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts once the Trainer has been built."""
        self.run.started = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the schedule, which is asked for the rate of the next step, while the Trainer has not counted this one yet."""
        self.run.step = state.global_step + 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.after_step(state.global_step):
            control.should_save = True
        if self.run.why:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.written(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _with_labels(model: nn.Module, batch: Batch) -> Batch:
    """With labels that say which predictions count, where the loss takes them from the inputs: the Trainer counts these."""
    if "labels" in batch or "input_ids" not in batch or not getattr(model, "can_generate", lambda: False)():
        return batch
    ids = batch["input_ids"]
    targets = targets_of(model, batch)
    if targets is None or targets.shape != ids.shape:
        return batch
    labels = torch.full_like(ids, IGNORED)
    labels[:, 1:] = targets[:, :-1]  # the next token of each position, back in its own place
    return {**batch, "labels": labels}
