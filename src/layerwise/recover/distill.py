"""Learning from the dense model: its soft predictions beside the task's own loss (Hinton et al. 2015; DeiT, Touvron et al. 2021).

teacher = copy.deepcopy(model)                                  # before it is pruned
fine_tune(model, data, optimizer, keep=masks_of(model), loss=Distillation(teacher))
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ..errors import ConfigError, ModelError
from ..tasks import left_alone
from ..tasks.batches import Batch, call
from ..tasks.divergence import rows_of
from ..tasks.losses import loss_of


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened predictions times temperature^2, in nats, the mean over rows. (rows, classes), twice -> ().

    The factor keeps gradients at one size whatever the temperature. Raises ModelError where the two know different classes.
    """
    if logits.shape != teacher.shape:
        raise ModelError(
            f"the teacher's predictions are {tuple(teacher.shape)}, the student's {tuple(logits.shape)}: take a teacher of the same"
            " classes."
        )
    student, target = ((one.float() / temperature).log_softmax(-1) for one in (logits, teacher))
    return temperature**2 * kl_div(student, target, reduction="batchmean", log_target=True)


class Distillation:
    """A loss of (model, batch): (1 - alpha) times the task's own plus alpha times `distillation_loss` against a teacher.

    Defaults: DeiT's soft distillation, alpha 0.5, temperature 1; with alpha 1 labels are not needed. A student with a distillation token
    (transformers' DeiT) learns labels by its class token and the teacher by that one. The teacher is in evaluation mode, without
    gradients, and left as it was. It must not be the student itself.
    """

    def __init__(self, teacher: nn.Module, *, alpha: float = 0.5, temperature: float = 1.0) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"Distillation: alpha={alpha:g}: give the teacher's share of the loss, 0 to 1.")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"Distillation: temperature={temperature:g}: give a finite number above 0.")
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar, with its graph. Raises ConfigError for a student that is the teacher, and what the task's loss raises."""
        if model is self.teacher:
            raise ConfigError(
                "Distillation: the teacher is the model that is trained. Give a copy made before pruning."
            )
        said: list[Any] = []
        handle = model.register_forward_hook(lambda module, inputs, output: said.append(output))
        try:
            own = loss_of(model, batch) if self.alpha < 1 else None
            output = said[-1] if said else call(model, batch)
        finally:
            handle.remove()
        if self.alpha == 0 and own is not None:
            return own
        fields = output if isinstance(output, Mapping) else {}
        if own is not None and "cls_logits" in fields:
            logits = fields["cls_logits"]
            own = cross_entropy(logits.float(), batch["labels"].to(logits.device))
        taught = distillation_loss(_rows(fields, output, batch), self._target(batch), self.temperature)
        return taught if own is None else (1 - self.alpha) * own + self.alpha * taught

    def _target(self, batch: Batch) -> Tensor:
        asked = {name: value for name, value in batch.items() if name != "labels" or "input_ids" in batch}
        with left_alone([self.teacher]), torch.no_grad():
            rows, logits = rows_of(call(self.teacher, asked), batch, self.teacher)
        if not logits:
            raise ModelError(f"{type(self.teacher).__name__} gives no logits to learn from.")
        return rows


def _rows(fields: Mapping[str, Any], output: object, batch: Batch) -> Tensor:
    if isinstance(token := fields.get("distillation_logits"), Tensor):
        return token
    return rows_of(output, batch)[0]
