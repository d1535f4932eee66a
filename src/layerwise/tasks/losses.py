"""What a loss is: one number for a batch of any model whose output says what it was trained for.

| the model gives | the loss | labels |
|---|---|---|
| logits of tokens, and generates (Llama, LLaVA, BLIP-2) | cross-entropy of the next token | `labels`, else `input_ids` |
| the same with an encoder (T5, Whisper) | cross-entropy of what it writes | `labels`, else the next of `decoder_input_ids` |
| logits of classes (ViT, ResNet) | cross-entropy | `labels` |
| similarities (CLIP) | the mean of both directions' cross-entropy | none: pairs belong together |
| a `loss` of its own | that | as the model takes them |

Padding and image tokens are never predicted, nor is anything at the place of padding.
Logits become float32 first. The model's own loss comes last: some are computed in the dtype of the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ..errors import DataError, ModelError
from .batches import Batch, call, has_encoder

Loss = Callable[[nn.Module, Batch], Tensor]  # a float32 scalar, with gradients where they are on
IGNORED = -100  # a label that does not count, as in torch and transformers


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of one batch in nats, a float32 scalar; see the table above. Gradients and mode are the caller's.

    A plain module that gives logits for every one of its `input_ids` is taken for a causal language model.
    Raises DataError if the batch lacks labels that this model needs, or labels do not fit; ModelError if the model's output is none that a
    loss is known for.
    """
    writes, encodes = _generates(model, batch), has_encoder(model)
    labels = batch.get("labels")
    if writes and encodes and labels is None and "decoder_input_ids" not in batch:
        raise DataError(_lacks(model, batch, "labels", "which token ids the decoder writes"))
    handed = (
        batch if _takes_labels(model, batch, writes, encodes) else {k: v for k, v in batch.items() if k != "labels"}
    )
    output = call(model, handed)
    fields = output if isinstance(output, Mapping) else {"logits": output} if isinstance(output, Tensor) else {}
    if isinstance(similar := fields.get("logits_per_image"), Tensor):
        return _contrastive(similar)
    logits = fields.get("logits")
    if isinstance(logits, Tensor) and logits.ndim == 3 and writes:
        return _mean(logits, _decoded(batch) if encodes else _next(_causal(model, batch)))
    if isinstance(logits, Tensor) and logits.ndim == 2 and (labels is None or _are_classes(labels, logits)):
        if labels is None:
            raise DataError(_lacks(model, batch, "labels", "the class of each sample"))
        return _mean(logits, labels)
    return _own(model, batch, fields)


def targets_of(model: nn.Module, batch: Batch) -> Tensor | None:
    """What each row of the logits is judged by, IGNORED where by nothing: (batch, tokens) of a model that writes, (batch,) of a classifier.

    None where the loss is of another kind: similarities, the model's own. Raises DataError where labels are lacking.
    """
    labels = batch.get("labels")
    if _generates(model, batch):
        if not has_encoder(model):
            return _next(_causal(model, batch))
        if labels is None and "decoder_input_ids" not in batch:
            raise DataError(_lacks(model, batch, "labels", "which token ids the decoder writes"))
        return _decoded(batch)
    return labels if labels is not None and labels.ndim == 1 and not labels.is_floating_point() else None


def _causal(model: nn.Module, batch: Batch) -> Tensor:
    """The token ids themselves, or `labels`: those of padding and of images do not count. (batch, tokens)"""
    if (labels := batch.get("labels")) is not None:
        return labels
    if (ids := batch.get("input_ids")) is None:
        raise DataError(_lacks(model, batch, "labels or input_ids", "the token ids to predict"))
    counts = torch.ones_like(ids, dtype=torch.bool)
    if (mask := batch.get("attention_mask")) is not None:  # without it nothing is padding: pad may be the EOS of a text
        counts &= _in_sight(mask)
    for token in _image_tokens(model):
        counts &= ids != token
    return ids.masked_fill(~counts, IGNORED)


def _decoded(batch: Batch) -> Tensor:
    """What the decoder should write at each of its positions: `labels`, else what it is fed next. (batch, tokens)"""
    if (labels := batch.get("labels")) is not None:
        return labels
    fed = batch["decoder_input_ids"]
    if (mask := batch.get("decoder_attention_mask")) is not None:
        fed = fed.masked_fill(~_in_sight(mask), IGNORED)
    return _next(fed)


def _in_sight(mask: Tensor) -> Tensor:
    """True for tokens that are no padding and do not come right after any: what padding on the left gives is no prediction."""
    real = mask.bool()
    return real & pad(real[:, :-1], (1, 0), value=True)


def _next(labels: Tensor) -> Tensor:
    """Position t is judged by label t + 1, the last by none. Labels move, not logits: these are many times larger."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over all labels that count. logits (..., classes), labels (...)."""
    if logits.shape[:-1] != labels.shape:
        raise DataError(
            f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}: give one label per prediction."
        )
    counted = labels[labels != IGNORED]
    if not len(counted):
        raise DataError("a batch has nothing to predict: all its labels are padding, images, or the first token.")
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= logits.shape[-1]:
        raise DataError(f"labels run from {low} to {high}; the model knows {logits.shape[-1]} classes.")
    # the labels are the batch's, so they may lie elsewhere than the model
    return cross_entropy(logits.float().flatten(0, -2), labels.to(logits.device).flatten(), ignore_index=IGNORED)


def _contrastive(per_image: Tensor) -> Tensor:
    """Image i belongs to text i: both directions of a square of similarities (images, texts), already times the temperature."""
    images, texts = per_image.shape
    if images != texts or images < 2:
        raise DataError(
            f"a contrastive batch has {images} images and {texts} texts. Give pairs, at least 2 in a batch: each is told from the others."
        )
    logits, own = per_image.float(), torch.arange(images, device=per_image.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def _own(model: nn.Module, batch: Batch, fields: Mapping[str, Any]) -> Tensor:
    """The loss that the model computes itself."""
    loss = fields.get("loss")
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.float().reshape(())
    if "labels" not in batch and "logits" in fields:
        raise DataError(_lacks(model, batch, "labels", "it computes its own loss from them"))
    given = ", ".join(fields) or "an output without names"
    raise ModelError(
        f"{type(model).__name__} has no loss that is known: it gives {given}. Wrap it in a module whose forward returns"
        ' {"loss": ...}, or use a method that needs no loss.'
    )


def _lacks(model: nn.Module, batch: Batch, what: str, meaning: str) -> str:
    return (
        f"a loss of {type(model).__name__} needs {what} ({meaning}); the batches hold {', '.join(batch) or 'nothing'}."
        " Give data with labels."
    )


def _are_classes(labels: Tensor, logits: Tensor) -> bool:
    """Class numbers, one a sample; labels of several classes or of numbers are the model's own business."""
    return not labels.is_floating_point() and labels.ndim == 1 and logits.shape[1] > 1


def _generates(model: nn.Module, batch: Batch) -> bool:
    """Whether it writes text, so that position t predicts token t + 1: transformers models say so themselves."""
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else "input_ids" in batch


def _takes_labels(model: nn.Module, batch: Batch, writes: bool, encodes: bool) -> bool:
    """Whether the model is handed the labels: a decoder is fed them, and some losses are the model's own. Else it would only compute
    a loss that is not used."""
    if writes:
        return encodes and "decoder_input_ids" not in batch
    labels = batch.get("labels")
    classes = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    return not (
        classes and hasattr(model, "can_generate")
    )  # `call` leaves them out where a plain module does not know them


def _image_tokens(model: nn.Module) -> list[int]:
    """Ids that stand for a piece of an image or video: nothing is to be predicted there."""
    config = getattr(model, "config", None)
    names = [f"{kind}_token_{word}" for kind in ("image", "video") for word in ("id", "index")]
    found = {getattr(config, name, None) for name in names}
    return [token for token in found if isinstance(token, int)]
