"""Adapt-Pruner's schedule: small steps in which blocks lose more or less by how much they change what goes through them
(Pan et al. 2025, arXiv:2502.03460, and its code, where text and code differ)."""

import math
from collections.abc import Mapping

LARGEST = 0.99


def scaled_importance(importances: Mapping[str, float], scale: str = "largest") -> dict[str, float]:
    """Centred, and divided by the largest distance from the mean: in [-1, 1], mean 0; all zeros where importances are alike.

    scale "rank": by rank instead, from -1 to 1 in even steps (the mean of ties), which one outlying block does not flatten: the first
    block's cosine is often far from all others'.
    """
    if scale == "rank":
        ordered = sorted(importances.values())
        places = {value: [i for i, other in enumerate(ordered) if other == value] for value in {*ordered}}
        last = max(1, len(ordered) - 1)
        importances = {name: sum(places[v]) / len(places[v]) / last for name, v in importances.items()}
    mean = sum(importances.values()) / len(importances)
    largest = max(abs(one - mean) for one in importances.values())
    if largest <= 1e-12 * max(1.0, abs(mean)):
        return dict.fromkeys(importances, 0.0)
    return {name: (one - mean) / largest for name, one in importances.items()}


def next_sparsities(
    before: Mapping[str, float], importances: Mapping[str, float], base: float, amplitude: float
) -> dict[str, float]:
    """s <- min(max(s + base - amplitude * importance, 0), 0.99), of scaled importances; all are of the sizes at the start."""
    return {name: min(max(s + base - amplitude * importances[name], 0.0), LARGEST) for name, s in before.items()}


def channels_left(start: int, sparsity: float) -> int:
    """floor(start (1 - s)), a sum of small steps not shifting a boundary by one."""
    return math.floor(start * (1 - sparsity) + 1e-9)


def heads_left(start: int, sparsity: float, size: int) -> int:
    """Heads of `size` rows: one goes when floor(ceil(start * size * s) / size) says so, in rows."""
    rows = start * size
    return start - (rows - math.floor(rows * (1 - sparsity) + 1e-9)) // size


def heads_shared(starts: Mapping[str, int], sparsities: Mapping[str, float], left: Mapping[str, int]) -> dict[str, int]:
    """Heads that stay when the shares of all groups are added up before they are rounded: as many whole heads go as the sum says, floors
    first, then where the fraction of a head is largest, ties in order; one stays everywhere.

    Rounding each group down by itself lets a group of K heads lose its first at 1 / K: with few key heads attention stays whole until
    MLPs are nearly gone. left: heads that are there now, none comes back.
    """
    wanted = {name: start * sparsities[name] for name, start in starts.items()}
    gone = {
        name: max(starts[name] - left[name], min(math.floor(wanted[name] + 1e-9), starts[name] - 1)) for name in starts
    }
    more = math.floor(sum(wanted.values()) + 1e-9) - sum(gone.values())
    order = sorted(starts, key=lambda name: -(wanted[name] - gone[name]))
    for name in order:
        if more > 0 and gone[name] < starts[name] - 1 and wanted[name] > gone[name]:
            gone[name], more = gone[name] + 1, more - 1
    return {name: starts[name] - gone[name] for name in starts}
