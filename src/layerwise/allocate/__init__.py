"""How a budget is shared out: numbers in, numbers out. No models, no tensors."""

from .bounds import Bound, check_feasible
from .erdos_renyi import erdos_renyi
from .even import uniform, uniform_plus
from .exact import exact_counts, sparsities_of
from .fill import water_fill
from .linear import linear_factors, linear_map
from .proportional import proportional

__all__ = [
    "Bound",
    "check_feasible",
    "erdos_renyi",
    "exact_counts",
    "linear_factors",
    "linear_map",
    "proportional",
    "sparsities_of",
    "uniform",
    "uniform_plus",
    "water_fill",
]
