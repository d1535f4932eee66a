"""Learning from the dense model: its soft predictions beside the task's own loss (Hinton et al. 2015; DeiT, Touvron et al. 2021), and
its blocks' outputs.

teacher = copy.deepcopy(model)                                  # before it is pruned
fine_tune(model, data, optimizer, keep=masks_of(model), loss=Distillation(teacher))
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import ConfigError, ModelError
from ..tasks import left_alone
from ..tasks.batches import Batch, call
from ..tasks.divergence import kl_rows, rows_of
from ..tasks.losses import IGNORED, loss_of, targets_of
from .chunked import Head, head_of, summed
from .hidden import block_pairs, outputs_of, relative_error, valid_tokens


def distillation_loss(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, *, beta: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """The divergence of softened predictions times temperature^2, in nats, the mean (or "sum") over rows. (rows, classes), twice -> ().

    beta 0: KL(teacher || student). 1: the reverse, which looks for one mode. Between: the generalised Jensen-Shannon divergence
    beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student (Agarwal et al. 2024, arXiv:2306.13649).
    The factor keeps gradients at one size whatever the temperature. Raises ModelError where the two know different classes.
    """
    if logits.shape != teacher.shape:
        raise ModelError(
            f"the teacher's predictions are {tuple(teacher.shape)}, the student's {tuple(logits.shape)}: take a teacher of the same"
            " classes."
        )
    student, target = ((one.float() / temperature).log_softmax(-1) for one in (logits, teacher))
    if beta == 0:
        total = _kl(target, student)
    elif beta == 1:
        total = _kl(student, target)
    else:
        mixed = torch.logsumexp(
            torch.stack([student + math.log(1 - beta), target + math.log(beta)]), dim=0
        )  # log of the mixture
        total = beta * _kl(target, mixed) + (1 - beta) * _kl(student, mixed)
    return temperature**2 * (total / len(logits) if reduction == "mean" else total)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), summed over all rows."""
    return kl_rows(log_p, log_q).sum()


class Distillation:
    """A loss of (model, batch): (1 - alpha) times the task's own plus alpha times `distillation_loss` against a teacher, plus `hidden`
    times the relative squared error of the blocks' outputs, summed over blocks.

    Defaults: DeiT's soft distillation, alpha 0.5, temperature 1, no hidden states; with alpha 1 labels are not needed. Of a language
    model those tokens count that have a next one to predict. A student with a distillation token (transformers' DeiT) learns labels by
    its class token and the teacher by that one. The teacher is in evaluation mode, without gradients, and left as it was. It must not
    be the student.

    beta: which divergence, see `distillation_loss`. vocabulary: classes that are compared, the first of each side's; None: all, and both
    must have as many (models pad theirs differently). blocks: block of the student -> that of the teacher, where they differ. rows: rows
    of a causal language model's logits that are in memory at a time; None: all at once. `parts`: the last terms, unweighted.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        beta: float = 0.0,
        hidden: float = 0.0,
        vocabulary: int | None = None,
        blocks: Mapping[str, str] | None = None,
        rows: int | None = 1024,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"Distillation: alpha={alpha:g}: give the teacher's share of the loss, 0 to 1.")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"Distillation: temperature={temperature:g}: give a finite number above 0.")
        if not 0 <= beta <= 1:
            raise ConfigError(f"Distillation: beta={beta:g}: give 0 (forward KL) to 1 (reverse KL).")
        if not 0 <= hidden < math.inf:
            raise ConfigError(f"Distillation: hidden={hidden:g}: give the weight of the blocks' errors, at least 0.")
        if rows is not None and rows < 1:
            raise ConfigError(f"Distillation: rows={rows}: give at least 1, or None.")
        self.teacher, self.alpha, self.temperature, self.beta = teacher, alpha, temperature, beta
        self.hidden, self.vocabulary, self.blocks, self.rows = hidden, vocabulary, blocks, rows
        self.parts: dict[str, float] = {}
        self._known: dict[str, Any] = {}  # what was found out about the student, once

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar, with its graph. `model` may be wrapped for several processes. Raises ConfigError for a student that is the teacher, and
        what the task's loss raises."""
        student: nn.Module = getattr(model, "module", model)
        if student is self.teacher:
            raise ConfigError(
                "Distillation: the teacher is the model that is trained. Give a copy made before pruning."
            )
        self.parts = {}
        heads = self._heads(student, batch)  # looks with a pass of its own
        with self._blocks(student, batch) as errors:
            total = self._whole(model, student, batch) if heads is None else self._in_chunks(model, batch, *heads)
        for error in errors:
            total = total + self.hidden * error
        return total

    def _heads(self, student: nn.Module, batch: Batch) -> tuple[Head, Head] | None:
        """Those of student and teacher, where both are plain; found with the first batch."""
        if self.rows is None:
            return None
        if self._known.get("student") is not student:
            found = [head_of(one, batch) for one in (student, self.teacher)]
            self._known = {"student": student, "heads": None if None in found else tuple(found)}
        heads: tuple[Head, Head] | None = self._known["heads"]
        return heads

    def _whole(self, model: nn.Module, student: nn.Module, batch: Batch) -> Tensor:
        """With all logits at once."""
        said: list[Any] = []
        handle = student.register_forward_hook(lambda module, inputs, output: said.append(output))
        try:
            own = loss_of(model, batch) if self.alpha < 1 else None
            output = said[-1] if said else call(model, batch)
        finally:
            handle.remove()
        if self.alpha == 0 and own is not None:
            if self.hidden:
                self._ask_teacher(batch)
            return self._noted(own, None)
        fields = output if isinstance(output, Mapping) else {}
        if own is not None and "cls_logits" in fields:
            logits = fields["cls_logits"]
            own = cross_entropy(logits.float(), batch["labels"].to(logits.device))
        counted = _counted(student, batch)
        taught = distillation_loss(
            self._cut(_rows(fields, output, batch, counted)),
            self._cut(self._target(batch, counted)),
            self.temperature,
            beta=self.beta,
        )
        return self._noted(own, taught)

    def _in_chunks(self, model: nn.Module, batch: Batch, head: Head, other: Head) -> Tensor:
        """With the logits of a few rows at a time."""
        targets = targets_of(getattr(model, "module", model), batch)
        assert targets is not None  # noqa: S101  (a causal language model)
        short = {name: value for name, value in batch.items() if name != "labels"}
        with head.hidden() as seen:
            _short_call(model, short)
        with left_alone([self.teacher]), torch.no_grad(), other.hidden() as theirs:
            if self.alpha or self.hidden:
                _short_call(self.teacher, short)
        valid = (targets != IGNORED).to(seen[0].device)
        labels, ours = targets.to(valid.device)[valid], seen[0][valid]
        target = theirs[0].to(valid.device)[valid] if theirs else ours.detach()
        sums = {"task": 0.0, "teacher": 0.0}

        def loss(hidden: Tensor, part: slice) -> Tensor:
            logits = head.linear(hidden).float()
            task = cross_entropy(logits, labels[part], reduction="sum")
            sums["task"] += float(task.detach())
            if self.alpha == 0:
                return task
            with torch.no_grad():
                taught = self._cut(other.linear(target[part].to(other.linear.weight.device))).to(logits.device)
            learnt = distillation_loss(self._cut(logits), taught, self.temperature, beta=self.beta, reduction="sum")
            sums["teacher"] += float(learnt.detach())
            return (1 - self.alpha) * task + self.alpha * learnt

        if not len(labels):
            raise ModelError("a batch has nothing to predict: all its labels are padding, images, or the first token.")
        total = summed(loss, ours, head.parameters, self.rows or len(labels))
        self.parts |= {name: value / len(labels) for name, value in sums.items()}
        return total / len(labels)

    def _noted(self, own: Tensor | None, taught: Tensor | None) -> Tensor:
        parts = {"task": own, "teacher": taught}
        self.parts |= {name: float(value.detach()) for name, value in parts.items() if value is not None}
        if taught is None or own is None:
            return own if own is not None else taught  # type: ignore[return-value]  # one of them is there
        return (1 - self.alpha) * own + self.alpha * taught

    def _cut(self, logits: Tensor) -> Tensor:
        """The true vocabulary, without what models pad theirs with."""
        return logits if self.vocabulary is None else logits[..., : self.vocabulary]

    def _target(self, batch: Batch, counted: Tensor | None) -> Tensor:
        output = self._ask_teacher(batch)
        rows, logits = rows_of(output, batch, self.teacher)
        if not logits:
            raise ModelError(f"{type(self.teacher).__name__} gives no logits to learn from.")
        return rows if counted is None else _of_tokens(output, counted, rows)

    def _ask_teacher(self, batch: Batch) -> object:
        asked = {name: value for name, value in batch.items() if name != "labels" or "input_ids" in batch}
        with left_alone([self.teacher]), torch.no_grad():
            return call(self.teacher, asked)

    @contextmanager
    def _blocks(self, student: nn.Module, batch: Batch) -> Iterator[list[Tensor]]:
        """The errors of the blocks' outputs, once the context has ended; none where they do not count."""
        errors: list[Tensor] = []
        if not self.hidden:
            yield errors
            return
        if self._known.get("of") is not student:
            self._known |= {"of": student, "pairs": block_pairs(student, self.teacher, self.blocks)}
        pairs: list[tuple[str, str]] = self._known["pairs"]
        with ExitStack() as stack:
            ours = stack.enter_context(outputs_of(student, [name for name, _ in pairs]))
            theirs = stack.enter_context(outputs_of(self.teacher, [name for _, name in pairs]))
            yield errors
        for name, other in pairs:
            target = theirs[other].to(ours[name].device)
            errors.append(relative_error(ours[name], target, valid_tokens(student, batch, target, name)))
        self.parts["hidden"] = float(sum(error.detach() for error in errors))


def _counted(model: nn.Module, batch: Batch) -> Tensor | None:
    """Tokens that have something to predict, (batch, tokens) bool; None where predictions are of whole samples."""
    if "labels" not in batch and "input_ids" not in batch and "decoder_input_ids" not in batch:
        return None
    targets = targets_of(model, batch)
    return targets != IGNORED if targets is not None and targets.ndim == 2 else None


def _of_tokens(output: object, counted: Tensor, rows: Tensor) -> Tensor:
    """The logits of these tokens; `rows` where the output is of another shape."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == counted.shape:
        return logits[counted.to(logits.device)]
    return rows


def _rows(fields: Mapping[str, Any], output: object, batch: Batch, counted: Tensor | None) -> Tensor:
    if isinstance(token := fields.get("distillation_logits"), Tensor):
        return token
    rows = rows_of(output, batch)[0]
    return rows if counted is None else _of_tokens(output, counted, rows)


def _short_call(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """One forward pass that computes the logits of one position alone."""
    inner = getattr(model, "module", model)
    device = next(parameter.device for parameter in inner.parameters())
    arguments = {name: value.to(device) for name, value in batch.items()}
    model(**arguments, logits_to_keep=1, use_cache=False)
