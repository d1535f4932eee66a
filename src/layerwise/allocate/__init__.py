"""How a budget is shared out: numbers in, numbers out. No models, no tensors."""

from .bounds import Bound, check_feasible
from .cache_bits import mean_bits, stored_bits
from .cluster import clusters, dbscan
from .erdos_renyi import erdos_renyi
from .even import uniform, uniform_plus
from .exact import exact_counts, sparsities_of
from .fill import water_fill
from .linear import linear_factors, linear_map
from .pareto import Sum, additive_front, pareto_front
from .proportional import proportional

__all__ = [
    "Bound",
    "Sum",
    "additive_front",
    "check_feasible",
    "clusters",
    "dbscan",
    "erdos_renyi",
    "exact_counts",
    "linear_factors",
    "linear_map",
    "mean_bits",
    "pareto_front",
    "proportional",
    "sparsities_of",
    "stored_bits",
    "uniform",
    "uniform_plus",
    "water_fill",
]
