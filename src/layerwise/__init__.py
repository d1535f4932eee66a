"""layerwise decides how much to compress each layer of a neural network, does it, and proves what it cost.

Names are imported when they are first used, so that importing the package is quick and touches no accelerator.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import methods as methods
    from . import recover as recover
    from . import solvers as solvers
    from .cache import QuantizedKVCache as QuantizedKVCache
    from .engine import Result as Result
    from .engine import Settings as Settings
    from .engine import compress as compress
    from .engine import walk as walk
    from .evaluate import Evaluation as Evaluation
    from .evaluate import evaluate as evaluate
    from .io import load as load
    from .io import load_cache as load_cache
    from .io import load_tokenizer as load_tokenizer
    from .io import save as save
    from .plan import Plan as Plan
    from .runtime import fastest as fastest
    from .runtime import int8_on_cpu as int8_on_cpu
    from .shrink import register as register
    from .structure import Structure as Structure
    from .structure import structure_of as structure_of
    from .tasks import Batches as Batches
    from .tasks import held_out as held_out
    from .tasks import text as text

_HOME = {
    "Batches": "tasks",
    "Evaluation": "evaluate",
    "Plan": "plan",
    "QuantizedKVCache": "cache",
    "Result": "engine",
    "Settings": "engine",
    "Structure": "structure",
    "compress": "engine",
    "evaluate": "evaluate",
    "fastest": "runtime",
    "held_out": "tasks",
    "int8_on_cpu": "runtime",
    "load": "io",
    "load_cache": "io",
    "load_tokenizer": "io",
    "register": "shrink",
    "save": "io",
    "structure_of": "structure",
    "text": "tasks",
    "walk": "engine",
}
_ROOMS = ("methods", "solvers", "recover", "errors")
__all__ = [*_HOME, *_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
