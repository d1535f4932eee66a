"""Batches: where they come from, the facts that belong beside their numbers, and how one goes through a model."""

from .batches import Batch, Batches, call
from .divergence import Yardstick
from .images import images
from .text import check_vocabulary, continued, held_out, text
from .undisturbed import undisturbed

__all__ = [
    "Batch",
    "Batches",
    "Yardstick",
    "call",
    "check_vocabulary",
    "continued",
    "held_out",
    "images",
    "text",
    "undisturbed",
]
