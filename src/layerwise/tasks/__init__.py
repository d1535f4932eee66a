"""Batches: where they come from, the facts that belong beside their numbers, and how one goes through a model, and its loss there."""

from .batches import Batch, Batches, call
from .divergence import Yardstick
from .images import images
from .losses import Loss, loss_of
from .text import check_vocabulary, continued, held_out, text
from .undisturbed import left_alone, undisturbed

__all__ = [
    "Batch",
    "Batches",
    "Loss",
    "Yardstick",
    "call",
    "check_vocabulary",
    "continued",
    "held_out",
    "images",
    "left_alone",
    "loss_of",
    "text",
    "undisturbed",
]
