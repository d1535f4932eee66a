"""Which channels of a tensor must be kept or removed together: a layout is a row of runs over variables, and layouts can be tied.

A run (variable, inner) stands for `size * inner` channels in a row, `inner` of them for each unit of the variable. A convolution writes one
run; concatenation puts layouts side by side; a depthwise convolution with multiplier 2, or a flattened 4x4 map, gives every unit 2 or 16
channels; G groups are the same runs G times. Tying two layouts splits and binds variables until both read the same. Sizes alone are
used, so a padded shortcut, a shuffle and the halves of a chunk need no rule of their own; what cannot be split in whole units is held at
its full width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import lcm


@dataclass(eq=False)
class Variable:
    """Units that are kept or removed each for itself. fixed: the width may not change. residual: what meets at an addition. reasons: why
    it is fixed, in words."""

    size: int
    fixed: bool = False
    residual: bool = False
    reasons: list[str] = field(default_factory=list)
    bound: "Layout | None" = None  # what it has become


Layout = tuple[tuple[Variable, int], ...]


def new(size: int, *, fixed: bool = False, why: str = "") -> Layout:
    """One run of a new variable."""
    return ((Variable(size, fixed, reasons=[why] if why else []), 1),)


def resolved(layout: Iterable[tuple[Variable, int]]) -> Layout:
    """The same in variables that have become nothing else."""
    found: list[tuple[Variable, int]] = []
    for variable, inner in layout:
        if variable.bound is None:
            found.append((variable, inner))
        else:
            found += [(one, more * inner) for one, more in resolved(variable.bound)]
    return tuple(found)


def width(layout: Layout) -> int:
    """Channels."""
    return sum(variable.size * inner for variable, inner in layout)


def repeated(layout: Layout, inner: int, times: int = 1) -> Layout:
    """Every channel `inner` times in a row, and all of it so many times."""
    return tuple((variable, own * inner) for variable, own in layout) * times


def fix(layout: Layout, why: str) -> None:
    """Hold everything in it at its full width."""
    for variable, _ in resolved(layout):
        variable.fixed = True
        if why not in variable.reasons:
            variable.reasons.append(why)


def tie(a: Layout, b: Layout, *, residual: bool = False) -> None:
    """Make both layouts, equally wide, read the same; what cannot be split so that it does is fixed."""
    left, right = list(resolved(a)), list(resolved(b))
    while left:
        if (left[0][0].size * left[0][1]) < (right[0][0].size * right[0][1]):
            left, right = right, left
        if not _heads_agree(left, right):
            why = "its channels meet others in an order that cannot be split"
            fix(a, why)
            fix(b, why)
            break
        left, right = list(resolved(left)), list(resolved(right))
        while left and left[0] == right[0]:
            left.pop(0)
            right.pop(0)
    if residual:
        for variable, _ in resolved((*a, *b)):
            variable.residual = True


def _heads_agree(left: Sequence[tuple[Variable, int]], right: Sequence[tuple[Variable, int]]) -> bool:
    """One step: split the first run of `left`, which is not the shorter, or bind one of the first two to the other. False: not possible."""
    (u, i), (v, j) = left[0], right[0]
    if (u, i) == (v, j):
        return True
    if u.size * i > v.size * j:
        if (v.size * j) % i:
            return False
        _split(u, (v.size * j) // i)
        return True
    if u is v:  # the same size with another inner cannot be
        return False
    if i == j:
        _bind(v, ((u, 1),))
        return True
    common = lcm(i, j)
    if (u.size * i) % common:
        return False
    if i == common:
        _bind(v, ((u, i // j),))
    elif j == common:
        _bind(u, ((v, j // i),))
    else:
        both = new(u.size * i // common)
        _bind(u, repeated(both, common // i))
        _bind(v, repeated(both, common // j))
    return True


def _bind(variable: Variable, to: Layout) -> None:
    variable.bound = to
    for one, _ in to:
        one.fixed |= variable.fixed
        one.residual |= variable.residual
        one.reasons += [why for why in variable.reasons if why not in one.reasons]


def _split(variable: Variable, at: int) -> None:
    _bind(variable, (*new(at), *new(variable.size - at)))


def cut_at(layout: Layout, at: int) -> tuple[Layout, Layout] | None:
    """The first `at` channels and the rest, variables split where the cut goes through; None where it goes through a unit."""
    before: list[tuple[Variable, int]] = []
    left = list(resolved(layout))
    while at:
        variable, inner = left[0]
        if variable.size * inner > at:
            if at % inner:
                return None
            _split(variable, at // inner)
            left = [*resolved(left)]
            before = [*resolved(before)]
            continue
        at -= variable.size * inner
        before.append(left.pop(0))
    return tuple(before), tuple(left)
