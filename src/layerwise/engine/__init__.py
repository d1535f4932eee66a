"""The one walk over a model: statistics, solvers, the compressed block's output, checkpoints, several processes."""

from .compress import Result, compress
from .events import BlockFinished, BlockStarted, Event, LayerSolved, PassesWaiting
from .ranks import Ranks
from .walk import Settings, walk
from .work import Work

__all__ = [
    "BlockFinished",
    "BlockStarted",
    "Event",
    "LayerSolved",
    "PassesWaiting",
    "Ranks",
    "Result",
    "Settings",
    "Work",
    "compress",
    "walk",
]
