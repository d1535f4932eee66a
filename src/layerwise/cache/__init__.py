"""The KV cache of a language model with its own bits for the keys and values of every layer."""

from .quantizers import Quantized, pack, quantize, quantize_reference, unpack

__all__ = ["Quantized", "pack", "quantize", "quantize_reference", "unpack"]
