"""How far a model's predictions have moved from the dense model's: KL divergence of logits, or the error of any other output."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils._pytree import tree_leaves

from ..errors import DataError, ModelError, ScoreError
from .batches import Batch, call

_MOST = 2**26  # numbers of the dense model's predictions that are kept: 256 MB in float32


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row of log-probabilities. (rows, classes), twice -> (rows,), >= 0 up to rounding.

    0 log 0 = 0: some models mask part of their vocabulary with -inf.
    """
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill_(log_p.isneginf(), 0.0).sum(-1)


def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """(rows, ...) of what the model says in its own dtype, and whether these are logits, (rows, classes).

    Logits are of each token that is no padding (of an encoder-decoder, the decoder's), or of each sample (image, pair). A model without
    logits, such as one that denoises, has one row per sample of its first output. Raises ModelError where there is no tensor.
    """
    return rows_of(call(model, batch), batch, model)


def rows_of(output: object, batch: Batch, model: nn.Module | None = None) -> tuple[Tensor, bool]:
    """The same of an output that is there already; `model` is named in errors."""
    fields = output if isinstance(output, Mapping) else {}
    logits = next((found for name in ("logits", "logits_per_image") if (found := fields.get(name)) is not None), None)
    if logits is None:
        first = next(iter(tree_leaves(output)), None)
        if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim == 0:
            who = type(model).__name__ if model else "the model"
            raise ModelError(f"{who} gives no tensor of numbers, so there is nothing to compare.")
        ids = batch.get("input_ids")
        if first.ndim != 2 and (first.ndim != 3 or ids is None or ids.shape != first.shape[:2]):
            return first, False
        logits = first
    if logits.ndim != 3:
        return logits, logits.ndim == 2
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = batch.get(name)
        if mask is not None and mask.shape == logits.shape[:2]:
            return logits[mask.to(logits.device).bool()], True
    return logits.flatten(0, 1), True


class Yardstick:
    """The dense model's predictions on a few batches, kept, so that many compressed models can be held against them.

    By the KL divergence where there are logits, else by the squared difference over the squared size of the output. Where the
    predictions are more than `most` numbers, every second, third, ... row counts. The caller sees to evaluation mode.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, batches: Sequence[Batch], most: int = _MOST) -> None:
        if not len(batches):
            raise DataError("there is no batch to compare models on.")
        self.batches = batches
        self.every = 1
        self.logits = True  # of which kind the predictions are
        self._kept: list[Tensor] = []
        for number, batch in enumerate(batches, start=1):
            said, self.logits = predictions(dense, batch)
            if number == 1:  # batches are of one kind: the first tells how much all will take
                self.every = max(1, -(-said.numel() * len(batches) // most))
            rows = said[:: self.every].float()
            self._kept.append(log_softmax(rows, dim=-1) if self.logits else rows.clone())
            if not rows.isfinite().any(-1).all():  # some models mask a part of their vocabulary with -inf
                raise ScoreError(
                    f"the dense model's outputs are not finite numbers in batch {number}. Check its weights."
                )

    @torch.no_grad()
    def rows(self, model: nn.Module) -> Tensor:
        """KL(dense || model) of every row in nats, or its squared error over the mean squared size of the batch's rows. float64, on
        the CPU, >= 0; infinite where it is no number."""
        found = []
        for batch, dense in zip(self.batches, self._kept, strict=True):
            said = predictions(model, batch)[0][:: self.every].float().to(dense.device)
            if self.logits:
                values = kl_rows(dense, log_softmax(said, dim=-1))
            else:
                values = (said - dense).square().flatten(1).sum(1) / dense.square().flatten(1).sum(1).mean().clamp_min(
                    1e-30
                )
            found.append(values.cpu().double())
        return torch.cat(found).clamp_min(0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def divergence(self, model: nn.Module) -> float:
        """The mean over all rows."""
        return float(self.rows(model).mean())
