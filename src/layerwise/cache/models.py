"""What the config of a model says of its KV cache: which layers have one that can be quantised, and what stays as it is."""

import sys
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from ..errors import ConfigError, ModelError
from .scheme import FULL, Pair, Scheme

_KINDS = {
    "DynamicSlidingWindowLayer": "sliding window",
    "LinearAttentionLayer": "state of fixed size",
    "DynamicIndexedLayer": "indexed attention",
    "LinearAttentionAndSlidingWindowAttentionLayer": "sliding window beside a state of fixed size",
    "DummyLayer": "no cache of its own",
}


def decoder_config(config: Any) -> Any:
    """The part of a model's config that describes its decoder.

    Raises ConfigError for what is no config, ModelError for a model without a KV cache of the usual kind, named.
    """
    if not hasattr(config, "get_text_config"):
        raise ConfigError(f"config={type(config).__name__}: give the config of a transformers model, model.config.")
    decoder = config.get_text_config(decoder=True)
    kind = decoder.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder model, with a second cache for cross-attention: not supported.")
    if getattr(decoder, "kv_lora_rank", None):
        raise ModelError(
            f"{kind} has multi-head latent attention (MLA): its cache is compressed by the model itself and cannot be quantised here."
        )
    return decoder


def stock_layers(decoder: Any) -> list[Any]:
    """The layers of transformers' own cache for this decoder, empty. Raises ModelError if none is of the usual kind, named."""
    if own := _own_cache(decoder):
        raise ModelError(
            f"{decoder.model_type} has a cache of its own kind ({own}), for the states of its linear attention too, and takes no other."
        )
    layers = list(DynamicCache(config=decoder).layers)
    if not any(quantizable(layer) for layer in layers):
        kinds = ", ".join(sorted({_kind(layer) for layer in layers}))
        raise ModelError(f"{decoder.model_type} has no attention with a KV cache that grows with the text ({kinds}).")
    plain = all(type(layer) is DynamicLayer for layer in layers)  # also where the config says nothing
    if plain and getattr(_class_of(decoder), "_is_stateful", False):  # RWKV, xLSTM
        raise ModelError(f"{decoder.model_type} has no KV cache: it keeps a state of fixed size instead.")
    return layers


def quantizable(layer: Any) -> bool:
    """Whether this keeps the keys and values of every token, alone or beside a state of fixed size (Falcon-H1)."""
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def check_pairs(pairs: Sequence[Pair], layers: Sequence[Any], decoder: Any, scheme: Scheme) -> None:
    """Raise ConfigError for another number of layers, ShapeError for heads that the scheme does not divide, the layer named."""
    if len(pairs) != len(layers):
        raise ConfigError(
            f"{len(pairs)} pairs of bits for a model with {len(layers)} decoder layers: give one for each."
        )
    configs = getattr(decoder, "per_layer_config", None) or [decoder] * len(layers)
    for index, (pair, layer, one) in enumerate(zip(pairs, layers, configs, strict=True)):
        size = head_size(one)
        if size is not None and quantizable(layer):
            scheme.check(pair, size, size, f"layer {index}: ")


def head_size(decoder: Any) -> int | None:
    """Channels of a head, or None where the config does not say."""
    size = getattr(decoder, "head_dim", None)
    if size is None:
        hidden, heads = getattr(decoder, "hidden_size", None), getattr(decoder, "num_attention_heads", None)
        size = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    return size


def left_full(pairs: Sequence[Pair], layers: Sequence[Any]) -> tuple[str, ...]:
    """One sentence for each kind of layer that stays in full precision although fewer bits were asked for."""
    found: dict[str, list[int]] = {}
    for index, (pair, layer) in enumerate(zip(pairs, layers, strict=True)):
        if pair != FULL and not quantizable(layer):
            found.setdefault(_kind(layer), []).append(index)
    return tuple(
        f"{'layer' if len(at) == 1 else 'layers'} {few(at)}: full precision, not fewer bits ({kind})."
        for kind, at in found.items()
    )


def few(indices: Sequence[int]) -> str:
    """The first of many."""
    return ", ".join(map(str, indices[:6])) + (f", … ({len(indices)} in all)" if len(indices) > 6 else "")


def _kind(layer: Any) -> str:
    return _KINDS.get(type(layer).__name__, type(layer).__name__)


def _own_cache(decoder: Any) -> str | None:
    """The cache class that the model's file defines beside it and asks for (MiniMax); None without one."""
    known = _class_of(decoder)
    if known is None:
        return None
    caches = (
        one for one in vars(sys.modules[known.__module__]).values() if isinstance(one, type) and issubclass(one, Cache)
    )
    return next((one.__name__ for one in caches if one.__module__ == known.__module__), None)


def _class_of(decoder: Any) -> type | None:
    """Transformers' language model for this config, if it knows one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known: type | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(decoder), None)
    return known
