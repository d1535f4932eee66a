"""The KV cache of a language model with its own bits for the keys and values of every layer."""

from .cache import QuantizedKVCache
from .plans import has_cache, pairs_of
from .quantizers import Quantized, pack, quantize, quantize_reference, unpack
from .scheme import FULL, Pair, Scheme, cache_bytes, pair_name, parse_pair, true_bits

__all__ = [
    "FULL",
    "Pair",
    "Quantized",
    "QuantizedKVCache",
    "Scheme",
    "cache_bytes",
    "has_cache",
    "pack",
    "pair_name",
    "pairs_of",
    "parse_pair",
    "quantize",
    "quantize_reference",
    "true_bits",
    "unpack",
]
