"""The one walk over a model: statistics, solvers, the compressed block's output, checkpoints, several processes."""

from .compress import Result, compress
from .events import BlockFinished, BlockStarted, BlockTuned, Event, LayerSolved, PassesWaiting
from .ranks import Ranks
from .settings import Settings
from .trial import Trials
from .tuning import SolvedBlock, Tuner
from .walk import walk, weights_key
from .work import Work

__all__ = [
    "BlockFinished",
    "BlockStarted",
    "BlockTuned",
    "Event",
    "LayerSolved",
    "PassesWaiting",
    "Ranks",
    "Result",
    "Settings",
    "SolvedBlock",
    "Trials",
    "Tuner",
    "Work",
    "compress",
    "walk",
    "weights_key",
]
