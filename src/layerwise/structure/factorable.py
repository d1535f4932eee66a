"""Layers that a product of factors can stand for: one matrix that multiplies its module's input and that no other module shares."""

from .parts import Layer


def factorable(layer: Layer) -> bool:
    """A linear or transformers' `Conv1D`, not tied to anything."""
    return layer.kind in ("linear", "conv1d") and not layer.tied
