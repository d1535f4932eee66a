"""One file per method: how a budget is spread over the layers. Read one and you have read the recipe."""

from typing import Any

from ..errors import ConfigError
from ..settings import build
from ..solvers import SOLVERS
from .adapt_pruner import AdaptPruner
from .alpha_pruning import AlphaPruning
from .armor import Armor
from .auto import Auto
from .base import Method
from .ecoflap import ECoFLaP
from .erdos_renyi import ER, ERK, ERKPlus
from .farms import FARMS
from .flap import FLAP
from .grasp import GraSP, GraSPRatio
from .kv_verdict import KVSearch
from .kvtuner import KVTuner
from .least_error import LeastError
from .llm_pruner import LLMPruner
from .lpvit import LPViT
from .lwq import LWQ
from .owl import OWL
from .owlore import OwLore
from .precropping import PreConfig, PreCrop
from .random_ratios import RandomRatios
from .search import Search
from .shortgpt import ShortGPT
from .snip import SNIP, SNIPRatio
from .synflow import SynFlow
from .uniform import Uniform
from .uniform_bits import UniformBits
from .uniform_plus import UniformPlus
from .width_baselines import MagnitudeWidth, RandomWidth

__all__ = [
    "ER",
    "ERK",
    "FARMS",
    "FLAP",
    "LWQ",
    "METHODS",
    "OWL",
    "SNIP",
    "AdaptPruner",
    "AlphaPruning",
    "Armor",
    "Auto",
    "ECoFLaP",
    "ERKPlus",
    "GraSP",
    "GraSPRatio",
    "KVSearch",
    "KVTuner",
    "LLMPruner",
    "LPViT",
    "LeastError",
    "MagnitudeWidth",
    "Method",
    "OwLore",
    "PreConfig",
    "PreCrop",
    "RandomRatios",
    "RandomWidth",
    "SNIPRatio",
    "Search",
    "ShortGPT",
    "SynFlow",
    "Uniform",
    "UniformBits",
    "UniformPlus",
    "method_from",
]

# PreCrop and PreConfig decide before training, for `shrink.crop`: they are used from Python, and not in the table of the command line
METHODS: dict[str, type[Method]] = {
    "uniform": Uniform,
    "uniform-plus": UniformPlus,
    "er": ER,
    "erk": ERK,
    "erk-plus": ERKPlus,
    "owl": OWL,
    "ecoflap": ECoFLaP,
    "alpha-pruning": AlphaPruning,
    "farms": FARMS,
    "snip": SNIP,
    "snip-ratio": SNIPRatio,
    "grasp": GraSP,
    "grasp-ratio": GraSPRatio,
    "synflow": SynFlow,
    "lpvit": LPViT,
    "random": RandomRatios,
    "auto": Auto,
    "armor": Armor,
    "uniform-bits": UniformBits,
    "lwq": LWQ,
    "least-error": LeastError,
    "kvtuner": KVTuner,
    "owlore": OwLore,
    "magnitude-width": MagnitudeWidth,
    "random-width": RandomWidth,
    "llm-pruner": LLMPruner,
    "flap": FLAP,
    "shortgpt": ShortGPT,
    "adapt-pruner": AdaptPruner,
}


def method_from(name: str, **settings: Any) -> Method:
    """The method of this name with these settings, the others at their defaults.

    Raises ConfigError for an unknown name or setting, offering the nearest, for a value of the wrong type or outside its range.
    """
    if name in SOLVERS and name not in METHODS:
        raise ConfigError(
            f'"{name}" is a solver, which computes the weights; a method says how much goes where. Give a method such as uniform, and'
            f" {name} as the solver."
        )
    return build("method", METHODS, name, settings)
