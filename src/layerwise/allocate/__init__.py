"""How a budget is shared out: numbers in, numbers out. No models, no tensors."""

from .bounds import Bound, check_feasible
from .cache_bits import mean_bits, stored_bits
from .cluster import clusters, dbscan
from .energy import TABLES, EnergyTable, energy_table
from .equal_slope import equal_slope, smoothed, stencil_slopes
from .erdos_renyi import erdos_renyi
from .even import uniform, uniform_plus
from .exact import exact_counts, sparsities_of
from .expected_flow import flow_densities
from .fill import water_fill
from .hull_counts import hull_counts
from .joint_widths import Program, Shape, Side, joint_widths
from .least_error import Choice, Errors, hull_levels, least_error_levels
from .levels import Costs, average, by_score, check_levels, levels_in_order, merged
from .linear import linear_factors, linear_map
from .log_fit import fitted_widths
from .pareto import Sum, additive_front, pareto_front
from .proportional import proportional
from .whole_widths import Steps, whole_widths

__all__ = [
    "TABLES",
    "Bound",
    "Choice",
    "Costs",
    "EnergyTable",
    "Errors",
    "Program",
    "Shape",
    "Side",
    "Steps",
    "Sum",
    "additive_front",
    "average",
    "by_score",
    "check_feasible",
    "check_levels",
    "clusters",
    "dbscan",
    "energy_table",
    "equal_slope",
    "erdos_renyi",
    "exact_counts",
    "fitted_widths",
    "flow_densities",
    "hull_counts",
    "hull_levels",
    "joint_widths",
    "least_error_levels",
    "levels_in_order",
    "linear_factors",
    "linear_map",
    "mean_bits",
    "merged",
    "pareto_front",
    "proportional",
    "smoothed",
    "sparsities_of",
    "stencil_slopes",
    "stored_bits",
    "uniform",
    "uniform_plus",
    "water_fill",
    "whole_widths",
]
