"""What quantised keys and values do to each attention: KVTuner's sensitivity (Li et al. 2025, arXiv:2502.04420, appendix B).

Exact keys and values, as they are cached (after rotary embedding), and the queries of decoding are replayed with the keys and values of
every pair of bit widths. Nothing accumulates: each attention sees its exact input. The paper publishes no code for this step. What it
leaves open: |.| is the Euclidean norm of the vector of one token and head, since element-wise ratios do not give its numbers. Queries of
decoding are those of the last part of each sample, teacher-forced: in a causal model they are the ones that decoding has at these
positions, all in one forward pass, and they do not depend on how tokens are drawn. Data that the model itself has written gives the paper's
own setting.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, ScoreError
from ..passes import check_whole
from ..passes.wrapping import running
from ..tasks import undisturbed
from ..tasks.batches import Batch, call
from .watching import tell

Pair = tuple[int, int]
"""Bits of the keys, bits of the values."""
Quantise = Callable[[Tensor, int, Literal["key", "value"]], Tensor]
"""(batch, kv_heads, tokens, head_dim) and bits -> the same after a trip through the cache's grid."""

_How = dict[str, Any]  # scaling, mask, softcap, sinks: arguments of attention_weights
_NAME = "layerwise_attention_error"
_FLOOR = 1e-6  # of the norms that are divided by


@dataclass(frozen=True)
class AttentionError:
    """Means over tokens and heads. key, value, output: norm of the error over the norm; weights: absolute, per visible position."""

    key: float
    value: float
    weights: float
    output: float


def attention_weights(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(batch, heads, queries, tokens), float32: softmax of the scaled products, each key head serving heads / kv_heads query heads.

    query: (batch, heads, queries, head_dim). key: (batch, kv_heads, tokens, head_dim). mask: added, (batch, 1 or heads, queries, tokens).
    softcap: products are squeezed into (-softcap, softcap) by tanh (Gemma 2). sinks: (heads,), a logit that takes its share and
    gives nothing (gpt-oss).
    """
    batch, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * queries, width)
    logits = (grouped @ key.float().transpose(-1, -2) * scaling).reshape(batch, heads, queries, -1)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits + mask.float()
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().reshape(1, -1, 1, 1).expand(batch, heads, queries, 1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    return weights if sinks is None else weights[..., :-1]


def attention_output(weights: Tensor, value: Tensor) -> Tensor:
    """(batch, heads, queries, width), float32. weights: (batch, heads, queries, tokens). value: (batch, kv_heads, tokens, width)."""
    batch, heads, queries, tokens = weights.shape
    kv_heads = value.shape[1]
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads * queries, tokens)
    return (grouped @ value.float()).reshape(batch, heads, queries, -1)


def relative_error(exact: Tensor, other: Tensor) -> Tensor:
    """(...): norm of the difference over the norm of `exact`, at least 1e-6, along the last axis of (..., width)."""
    ratio: Tensor = (exact.float() - other.float()).norm(dim=-1) / exact.float().norm(dim=-1).clamp_min(_FLOOR)
    return ratio


def pair_errors(
    query: Tensor, key: Tensor, value: Tensor, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], **how: Any
) -> Iterator[tuple[Pair, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """For each pair of `keys` and `values` (bits -> quantised) the rows whose means are the errors, in the order of AttentionError.

    Of keys and values (batch, kv_heads, tokens), of weights and output (batch, heads, queries). how: scaling, mask, softcap, sinks.
    """
    mask = how.get("mask")
    weights = attention_weights(query, key, **how)
    output = attention_output(weights, value)
    # masks hold 0 and a number far below any logit
    visible = weights.shape[-1] if mask is None else (mask > -1e4).sum(-1).clamp_min(1)
    of_values = {bits: relative_error(value, other) for bits, other in values.items()}
    for key_bits, other_key in keys.items():
        others = attention_weights(query, other_key, **how)
        of_keys, of_weights = relative_error(key, other_key), (weights - others).abs().sum(-1) / visible
        for value_bits, other_value in values.items():
            of_output = relative_error(output, attention_output(others, other_value))
            yield (key_bits, value_bits), (of_keys, of_values[value_bits], of_weights, of_output)


def attention_errors(
    model: nn.Module,
    data: Sequence[Batch],
    quantise: Quantise,
    bits: Sequence[int] = (2, 4, 8),
    tail: float = 0.5,
) -> dict[str, dict[Pair, AttentionError]]:
    """Attention name -> pair of bits -> errors, for every decoder attention in order, low = sturdy; one forward pass over the data.

    quantise: the grid of the cache. tail: the share of each sample's tokens, from its end, whose queries count as decoding. Padding (where
    the attention mask is 0) counts for nothing. Sliding windows, soft caps, sinks and grouped heads are the model's own. The keys, values
    and queries of one attention and batch are in memory at a time. Raises ModelError for a model whose attention does not go
    through transformers' attention interface, or is computed in a way that is not known; ScoreError naming the attention if an error is
    not finite.
    """
    if not len(data):
        raise DataError("attention_errors needs batches to look at.")
    check_whole(model, "attention_errors")
    seen = _Sums(model, quantise, bits)
    with undisturbed([model]), _listening(model, seen.add):
        for number, batch in enumerate(data):
            tell(number, len(data), "sensitivity of the cache")
            seen.real, seen.decode = _counted(batch, tail)
            with running(number):
                call(model, batch)
    tell(len(data), len(data))
    if not seen.sums:
        raise ModelError(
            f"{type(model).__name__}: none of its attentions has a key-value cache of the usual kind."
            if seen.others
            else f"{type(model).__name__}: its attentions do not go through transformers' attention interface, so their queries cannot be"
            " seen and what its cache can lose is not known. Choose the bits of its QuantizedKVCache yourself."
        )
    order = sorted(seen.sums, key=lambda name: getattr(model.get_submodule(name), "layer_idx", 0) or 0)
    return {name: {pair: _mean(name, *parts) for pair, parts in seen.sums[name].items()} for name in order}


@contextmanager
def _listening(
    model: nn.Module, add: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, _How], None]
) -> Iterator[None]:
    """Every attention of the decoder computes as in eager mode and hands what it saw to `add`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = decoder_config(model)

    def listen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
        beside = vars(sys.modules[type(module).__module__])
        if beside.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS) is not ALL_ATTENTION_FUNCTIONS:
            raise ModelError(
                f"{type(module).__name__} has attention functions of its own, with masks that depend on cached values, so what its cache"
                " can lose is not known. Choose the bits of its QuantizedKVCache yourself."
            )
        eager = beside.get("eager_attention_forward")
        if eager is None:
            raise ModelError(
                f"{type(module).__name__}: its attention has no eager form, so its queries cannot be seen."
            )
        made = eager(module, query, key, value, attention_mask, **more)
        how = {
            "scaling": more.get("scaling") or query.shape[-1] ** -0.5,
            "mask": attention_mask,
            "softcap": more.get("softcap"),
            "sinks": more.get("s_aux", more.get("sinks")),
        }
        add(module, query, key, value, made[0], how)
        return made

    before = config._attn_implementation
    # both are looked for among those of the whole process: a model may have a table of its own
    ALL_ATTENTION_FUNCTIONS.register(_NAME, listen)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
    try:
        config._attn_implementation = _NAME
        yield
    finally:
        config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(_NAME, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(_NAME, None)


def decoder_config(model: nn.Module) -> Any:
    """The configuration of the decoder that keeps a cache. Raises ModelError for a model without one, or with an encoder before it."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{type(model).__name__} is no transformers model: it has no key-value cache to decide about.")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has an encoder: its cache holds more than keys and values of decoded tokens."
        )
    return config.get_text_config(decoder=True)


def _counted(batch: Batch, tail: float) -> tuple[Tensor, Tensor]:
    """(batch, tokens) each: True where a token is no padding, and where its query counts as decoding."""
    ids = batch.get("input_ids")
    if ids is None:
        raise DataError("attention_errors needs batches of tokens (input_ids).")
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.ndim != 2 else mask.bool()
    left = real.flip(1).cumsum(1).flip(1)  # real tokens from here to the end
    return real, real & (left <= (tail * real.sum(1, keepdim=True)).ceil())


class _Sums:
    """Sums and counts of every attention's errors, and which positions of the batch under way count."""

    def __init__(self, model: nn.Module, quantise: Quantise, bits: Sequence[int]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.quantise, self.bits = quantise, bits
        self.sums: dict[str, dict[Pair, tuple[Tensor, Tensor]]] = {}
        self.real = self.decode = torch.empty(0)
        self.others = 0  # attentions heard of which nothing is cached by the token

    def add(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, output: Tensor, how: _How) -> None:
        """One attention and batch. output: (batch, queries, heads, width), as the model computed it."""
        if not getattr(module, "is_causal", True) or key.shape[2] != query.shape[2]:
            self.others += 1  # an encoder, or attention across to one
            return
        name, real, decode = self.names[module], self.real.to(query.device), self.decode.to(query.device)
        columns = decode.any(0).nonzero().flatten()  # samples of unequal length: the queries that any of them needs
        decode, query, mask = decode[:, columns], query[:, :, columns], how["mask"]
        how = {**how, "mask": None if mask is None else mask[:, :, columns, : key.shape[2]]}
        _check_known(name, attention_output(attention_weights(query, key, **how), value), output[:, columns], decode)
        keys = {one: self.quantise(key, one, "key") for one in self.bits}
        values = {one: self.quantise(value, one, "value") for one in self.bits}
        entry = self.sums.setdefault(name, {})
        for pair, rows in pair_errors(query, key, value, keys, values, **how):
            counted = zip(rows, (real, real, decode, decode), strict=True)
            parts = [of[which.unsqueeze(1).expand_as(of)] for of, which in counted]
            sums = torch.stack([part.double().sum() for part in parts]).cpu()
            counts = torch.tensor([part.numel() for part in parts], dtype=torch.float64)
            before = entry.get(pair)
            entry[pair] = (sums, counts) if before is None else (before[0] + sums, before[1] + counts)


def _check_known(name: str, own: Tensor, models: Tensor, decode: Tensor) -> None:
    """Raise ModelError unless our output (batch, heads, queries, width) is the model's (batch, queries, heads, width) up to its dtype."""
    own = own.transpose(1, 2)
    off = relative_error(models.reshape(own.shape), own)[decode]
    if off.numel() and float(off.max()) > (1e-3 if models.dtype == torch.float32 else 0.05):
        raise ModelError(
            f'"{name}": this attention does more than softmax(queries keys) values, off by {float(off.max()):.2g};'
            " what its cache can lose is not known."
        )


def _mean(name: str, sums: Tensor, counts: Tensor) -> AttentionError:
    made = AttentionError(*(float(one) for one in sums / counts.clamp_min(1)))
    if not all(one - one == 0 for one in astuple(made)):
        raise ScoreError(
            f'"{name}": an error of its attention is not finite. Check the weights, or load them in bfloat16 or float32.'
        )
    return made


def all_pairs(bits: Sequence[int] = (2, 4, 8)) -> list[Pair]:
    """Every pair of bits, most bits first; of equal sums the one with more bits for the keys first."""
    return sorted(product(bits, bits), key=lambda pair: (-sum(pair), -pair[0]))
