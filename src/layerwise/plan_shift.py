"""Plain arithmetic on zeros: raise or lower all layers evenly until they hold an exact number of zeros."""

from collections.abc import Sequence

from .errors import BudgetError


def shift_evenly(sizes: Sequence[int], sparsities: Sequence[float], zeros: int) -> list[int]:
    """Zeros per layer: every sparsity moved by one common amount, clipped to [0, 1], `zeros` in all, exactly.

    Largest remainder decides the last weights; of equal remainders the earlier layer gets it.
    Raises BudgetError if the layers cannot hold so many, or so few.
    """
    if not 0 <= zeros <= sum(sizes):
        raise BudgetError(f"{zeros} zeros do not fit into {sum(sizes)} weights. Ask for 0 to {sum(sizes)}.")

    def wanted(shift: float) -> list[float]:
        return [size * min(1.0, max(0.0, sparsity + shift)) for size, sparsity in zip(sizes, sparsities, strict=True)]

    low, high = -1.0, 1.0  # everything kept, everything removed
    for _ in range(100):  # more halvings than a float has bits
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wanted(middle)) < zeros else (low, middle)
    exact = wanted(high)
    counts = [int(value) for value in exact]
    order = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])  # stable: ties keep the earlier layer first
    step = 1 if sum(counts) <= zeros else -1
    while (missing := zeros - sum(counts)) != 0:
        movable = [i for i in order[::step] if 0 <= counts[i] + step <= sizes[i]]
        for i in movable[: abs(missing)]:
            counts[i] += step
    return counts
