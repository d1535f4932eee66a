"""The loss of one batch: what a gradient is taken of."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError, ModelError
from .batches import Batch, call

IGNORED = -100  # the label of a position that does not count, in torch and transformers alike


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch, a float32 scalar with its graph: of its examples, or of its tokens in a language model.

    Classifiers (logits of (batch, classes)) need `labels`, (batch,) int64. Causal language models (logits for every token) predict each
    token from those before it; without `labels` the inputs are the labels, and what the attention mask leaves out does not count.
    Computed from the logits, in float32 whatever the model's dtype. Raises DataError for labels that are missing or do not fit, ModelError
    for a model that gives neither kind of logits.
    """
    output = call(model, {name: value for name, value in batch.items() if name != "labels"})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    if isinstance(logits, Tensor) and logits.ndim == 3 and tokens is not None and logits.shape[:2] == tokens.shape:
        if labels is None:
            labels = tokens if (mask := batch.get("attention_mask")) is None else tokens.masked_fill(mask == 0, IGNORED)
        return _cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ModelError(
            f"{type(model).__name__} has no loss that is known here: it gives no logits of (batch, classes) and none for every token."
        )
    if labels is None:
        raise DataError(
            f"{type(model).__name__} is a classifier, and the batches have no labels: its loss needs them."
            " Give images in a folder for each class, or an .npz with `labels`."
        )
    return _cross_entropy(logits, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (rows, classes). Raises DataError unless there is one label for each row, and at least one that counts."""
    counted = labels[labels != IGNORED]
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or not len(counted):
        raise DataError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, {len(counted)} of them to be counted: give one int64 for each of"
            f" {len(logits)} predictions."
        )
    if not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[1]:
        raise DataError(
            f"labels run from {counted.min()} to {counted.max()}; the model knows {logits.shape[1]} classes."
        )
    return F.cross_entropy(logits.float(), labels.to(logits.device), ignore_index=IGNORED)
