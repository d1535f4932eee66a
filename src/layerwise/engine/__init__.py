"""The one walk over a model: statistics, solvers, the compressed block's output, checkpoints, several processes."""

from .compress import Result, compress
from .events import BlockFinished, BlockStarted, Event, LayerSolved, PassesWaiting
from .ranks import Ranks
from .trial import Trials
from .walk import Settings, walk, weights_key
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
    "Trials",
    "Work",
    "compress",
    "walk",
    "weights_key",
]
