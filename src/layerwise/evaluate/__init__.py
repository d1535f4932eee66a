"""What a compressed model lost and what it costs, each number with its protocol. `layerwise.evaluate` can also be called."""

import sys
from types import ModuleType
from typing import Any

from .accuracy import Accuracy, MultipleChoice, accuracy, multiple_choice
from .divergence import Divergence, divergence
from .evaluation import CacheFigures, Evaluation, evaluate
from .harness import HarnessResult, differences, harness
from .harness_figures import Figure
from .harness_tasks import Tasks, find_tasks
from .latency import Latency, latency
from .memory import PeakMemory, peak_memory
from .perplexity import Perplexity, perplexity
from .sparsity import ZeroCount, count_zeros

__all__ = [
    "Accuracy",
    "CacheFigures",
    "Divergence",
    "Evaluation",
    "Figure",
    "HarnessResult",
    "Latency",
    "MultipleChoice",
    "PeakMemory",
    "Perplexity",
    "Tasks",
    "ZeroCount",
    "accuracy",
    "count_zeros",
    "differences",
    "divergence",
    "evaluate",
    "find_tasks",
    "harness",
    "latency",
    "multiple_choice",
    "peak_memory",
    "perplexity",
]


class _Room(ModuleType):
    """`layerwise.evaluate` is this package and also the function users call: importing a submodule would hide the function."""

    def __call__(self, *args: Any, **options: Any) -> Evaluation:
        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Room
