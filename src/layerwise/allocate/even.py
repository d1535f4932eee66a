"""The same sparsity everywhere, and the same but for the first and the last layer."""

from collections.abc import Mapping

from ..errors import ConfigError
from .bounds import check_feasible


def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Name -> sparsity, the same for all."""
    check_feasible(sizes, sparsity)
    return dict.fromkeys(sizes, sparsity)


def uniform_plus(
    sizes: Mapping[str, int],
    sparsity: float,
    first: str | None = None,
    last: str | None = None,
    last_density: float = 0.2,
) -> dict[str, float]:
    """Name -> sparsity: the first layer stays dense, the last keeps at least `last_density`, the others share one that meets the budget.

    first, last: names; None takes the first and last of `sizes`. Raises BudgetError if so much cannot go.
    Source: Gale et al. 2019, arXiv:1902.09574, in the exact form: the code of Liu et al. 2022 misses the budget on both sides.
    """
    names = list(sizes)
    if not names:
        return {}
    first, last = names[0] if first is None else first, names[-1] if last is None else last
    for name in (first, last):
        if name not in sizes:
            raise ConfigError(f'uniform_plus: "{name}" is none of the {len(sizes)} layers.')
    caps = dict.fromkeys(sizes, 1.0) | {last: 1 - last_density} | {first: 0.0}
    check_feasible(sizes, sparsity, 0.0, caps)
    zeros, rest = sparsity * sum(sizes.values()), sum(sizes.values()) - sizes[first]
    others = zeros / rest if rest else 0.0
    result = dict.fromkeys(sizes, others) | {first: 0.0}
    if last != first and others > caps[last]:
        middle = rest - sizes[last]
        others = min(1.0, (zeros - caps[last] * sizes[last]) / middle) if middle else 0.0
        result = dict.fromkeys(sizes, others) | {last: caps[last]} | {first: 0.0}
    return result
