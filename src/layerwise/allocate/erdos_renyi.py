"""Erdős–Rényi densities: layers with few weights per input and output keep more of them.

Sources: SET (Mocanu et al. 2018) for ER, RigL (Evci et al. 2020, arXiv:1911.11134) for the kernel form ERK, Liu et al. 2022
(arXiv:2202.02643) for ERK+.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from ..errors import BudgetError, ConfigError
from .bounds import Bound
from .fill import water_fill


def erdos_renyi(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    kernel: bool = True,
    power: float = 1.0,
    dense: Collection[str] = (),
    *,
    sizes: Mapping[str, int] | None = None,
    low: Bound = 0.0,
    high: Bound = 1.0,
) -> dict[str, float]:
    """Name -> density, proportional to (sum of sizes) / (product of sizes) ** power, saturated at `high`, mean `density` by weight.

    shapes: (out, in, kernel...) of each weight. kernel: count all dimensions (ERK), else the first two (ER). dense: layers kept whole,
    the others share what is left (ERK+). sizes: weights of each layer where a layer is several matrices of its shape. low, high:
    bounds on the densities of the layers that are not in `dense`.
    A layer that saturates leaves its excess to the others: proportional water-filling gives what RigL's rounds do, in one solve.
    Raises BudgetError if the dense layers alone are over the budget.
    """
    if not 0 <= density <= 1:
        raise ConfigError(f"density={density:g}: give the fraction kept, 0 <= density <= 1.")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()} if sizes is None else sizes
    unknown = [name for name in dense if name not in shapes]
    if unknown:
        raise ConfigError(f'erdos_renyi: "{unknown[0]}" is to stay dense, and is none of the {len(shapes)} layers.')
    total, whole = sum(sizes[name] for name in shapes), sum(sizes[name] for name in set(dense))
    left = density * total - whole
    if left < -1e-9 * total:
        raise BudgetError(
            f"{len(set(dense))} of {len(shapes)} layers stay dense and hold {100 * whole / total:.4g} % of the weights; the target keeps"
            f" {100 * density:.4g} %. Lower the sparsity to {math.floor(1000 * (1 - whole / total) + 1e-6) / 1000:g},"
            " or keep fewer layers dense."
        )
    rest = {name: _raw(shape, kernel) ** power for name, shape in shapes.items() if name not in dense}
    if not rest:
        return dict.fromkeys(shapes, 1.0)
    filled = water_fill(rest, {name: sizes[name] for name in rest}, max(0.0, left), low, high, by="scale")
    return {name: filled.get(name, 1.0) for name in shapes}


def _raw(shape: Sequence[int], kernel: bool) -> float:
    counted = shape if kernel else shape[:2]
    return sum(counted) / max(1, math.prod(counted))
