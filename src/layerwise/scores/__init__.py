"""One number per layer or block, high = keep unless it is named in LOW_KEEPS: a tensor kernel, and apart from it the walk that feeds it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .alpha_cache import alphas_kept
from .alpha_hill import LayerTail, Look, alpha_hill, layer_tail, layer_tails
from .block_influence import block_influence, mean_turn
from .outlier_ratio import outlier_ratio, outlier_share
from .spectra import Windows, spectrum, window_spectrum
from .tail_fit import FITS, Fit, TailFit, fit_tail
from .watching import tell, watched


def _alpha_hill(model: Any, data: Any, structure: Any) -> dict[str, float]:
    return alpha_hill(model, structure)


# What can be looked at by name: (model, data, structure) -> {name: score}
SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "outlier-ratio": partial(outlier_ratio, factor=5.0),  # OWL's default factor
    "block-influence": block_influence,
    "alpha-hill": _alpha_hill,  # FARMS's defaults
}
WITHOUT_DATA = frozenset({"alpha-hill"})  # these look at weights alone: data may be None
LOW_KEEPS = frozenset({"alpha-hill"})  # the paper's own number, whose sign methods turn

__all__ = [
    "FITS",
    "LOW_KEEPS",
    "SCORES",
    "WITHOUT_DATA",
    "Fit",
    "LayerTail",
    "Look",
    "TailFit",
    "Windows",
    "alpha_hill",
    "alphas_kept",
    "block_influence",
    "fit_tail",
    "layer_tail",
    "layer_tails",
    "mean_turn",
    "outlier_ratio",
    "outlier_share",
    "spectrum",
    "tell",
    "watched",
    "window_spectrum",
]
