"""Reshapes and channels: which dimension they lie in afterwards, and how often each comes.

Dimensions before and after are matched in the smallest blocks of equal product. Merged with what is beside it, a channel comes once for
every position (flatten), or all of them come again and again; split in two, one part is a plain number in the code (the groups of a
shuffle) and the other may change. A size that is written as a number stays what it is, and so do the channels in it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from .channel_layout import Layout, fix, new, repeated, tie

_WHY = "the code gives its size as a number"


def merged_by_reshape(
    old: tuple[int, ...], axis: int, layout: Layout, shape: tuple[int, ...], asked: Sequence[Any]
) -> tuple[int | None, Layout]:
    """(axis, layout) after `old` became `shape`. asked: what the code gave, one for each dimension (int: a number; anything else is
    computed), or nothing where sizes follow by themselves. None: the channels cannot be followed, and are fixed."""
    before, after = _block(old, axis, shape)
    sizes = [shape[place] for place in after]
    wide = [place for place in after if shape[place] > 1]
    front, back = prod(old[before.start : axis]), prod(old[axis + 1 : before.stop])
    flat = repeated(layout, back, front)
    number = {place: bool(asked) and isinstance(asked[place], int) and asked[place] != -1 for place in after}
    if before.start == 0 and prod(old[before.start : axis]) > 1:  # batches and channels in one: nothing to follow
        fix(layout, "it is folded into the batch")
        return None, ()
    if len(wide) <= 1:
        place = wide[0] if wide else after[0]
        if number[place]:
            fix(flat, _WHY)
        return place, flat
    free = [place for place in wide if not number[place]]
    if len(wide) == 2 and len(free) == 1:
        (place,) = free
        other = next(one for one in wide if one != place)
        units = new(shape[place])
        tie(flat, repeated(units, shape[other]) if place < other else units * shape[other])
        return place, units
    fix(flat, _WHY if not free else f"it is reshaped to {sizes}")
    return None, ()


def _block(old: tuple[int, ...], axis: int, shape: tuple[int, ...]) -> tuple[range, range]:
    """The smallest ranges of dimensions, around `axis` before and where it went after, of equal product on both sides."""
    i = j = 0
    while True:
        start_i, start_j = i, j
        left, right = old[i], shape[j] if j < len(shape) else 1
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * shape[j], j + 1
        while i < len(old) and old[i] == 1 and j >= len(shape):  # one channel, last: it goes with what is before it
            i += 1
        if start_i <= axis < i:
            while j < len(shape) and shape[j] == 1 and i == len(old):
                j += 1
            return range(start_i, i), range(start_j, min(j, len(shape)))
