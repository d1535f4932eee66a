from .batches import Batch, Batches, call
from .text import check_vocabulary, held_out, text

__all__ = ["Batch", "Batches", "call", "check_vocabulary", "held_out", "text"]
