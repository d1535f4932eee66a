"""How far a model's predictions have moved: the KL divergence from the dense model's, on whatever gives logits."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ..errors import DataError, ModelError, ScoreError
from .batches import Batch, call

_MOST = 2**26  # numbers of the dense model's predictions that are kept: 256 MB in float32


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row of log-probabilities. (rows, classes), twice -> (rows,), >= 0 up to rounding.

    0 log 0 = 0: some models mask part of their vocabulary with -inf.
    """
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill_(log_p.isneginf(), 0.0).sum(-1)


def predictions(model: nn.Module, batch: Batch) -> Tensor:
    """(rows, classes) logits in the model's dtype: of each token that is no padding, or of each sample (image, pair).

    Of an encoder-decoder the tokens are those of the decoder. Raises ModelError for a model that gives no logits.
    """
    output = call(model, batch)
    fields = output if isinstance(output, Mapping) else {"logits": output}
    logits = next((found for name in ("logits", "logits_per_image") if (found := fields.get(name)) is not None), None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise ModelError(
            f"{type(model).__name__} gives no logits of tokens, samples or pairs, so there is nothing to compare."
        )
    if logits.ndim == 2:
        return logits
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = batch.get(name)
        if mask is not None and mask.shape == logits.shape[:2]:
            return logits[mask.to(logits.device).bool()]
    return logits.flatten(0, 1)


class Yardstick:
    """The dense model's predictions on a few batches, kept, so that many compressed models can be held against them.

    Where they are more than `most` numbers, every second, third, ... row counts. The caller sees to evaluation mode.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, batches: Sequence[Batch], most: int = _MOST) -> None:
        if not len(batches):
            raise DataError("there is no batch to compare models on.")
        self.batches = batches
        self.every = 1
        self._kept: list[Tensor] = []
        for number, batch in enumerate(batches, start=1):
            logits = predictions(dense, batch)
            if number == 1:  # batches are of one kind: the first tells how much all will take
                self.every = max(1, -(-logits.numel() * len(batches) // most))
            self._kept.append(log_softmax(logits[:: self.every].float(), dim=-1))
            if not self._kept[-1].logsumexp(-1).isfinite().all():
                raise ScoreError(
                    f"the dense model's logits are not finite numbers in batch {number}. Check its weights."
                )

    @torch.no_grad()
    def divergences(self, model: nn.Module) -> list[float]:
        """Mean KL(dense || model) in nats per row, batch by batch; infinite where the model's logits are no numbers."""
        found = []
        for batch, log_p in zip(self.batches, self._kept, strict=True):
            log_q = log_softmax(predictions(model, batch)[:: self.every].float(), dim=-1)
            mean = float(kl_rows(log_p, log_q.to(log_p.device)).double().mean())
            found.append(max(mean, 0.0) if mean == mean else float("inf"))
        return found
