"""Paused forward passes through the real model, and the input statistics collected on the way."""

from .collect import Collector, SharedInput
from .dense import collect_dense
from .paused import Enough, Forward, Pass, PausedPasses
from .reached import reached, reached_blocks
from .replay import Recording, Replays, Tail
from .residency import Store, at_hand, check_whole, store_of, weight_at_hand
from .spill import spilling
from .statistics import Accumulator, InputStatistics, Need
from .uses import uses_of
from .waiting import Waiting, waiting_of

__all__ = [
    "Accumulator",
    "Collector",
    "Enough",
    "Forward",
    "InputStatistics",
    "Need",
    "Pass",
    "PausedPasses",
    "Recording",
    "Replays",
    "SharedInput",
    "Store",
    "Tail",
    "Waiting",
    "at_hand",
    "check_whole",
    "collect_dense",
    "reached",
    "reached_blocks",
    "spilling",
    "store_of",
    "uses_of",
    "waiting_of",
    "weight_at_hand",
]
