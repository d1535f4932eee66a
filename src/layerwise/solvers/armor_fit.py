"""The two forms of an ARMOR fit, each as a generator that improves a state in place, and the one loop that ends them.

`exact`: the core by conjugate gradients, several groups of every block remasked, then A and B by minimisers; the loss never rises.
`adam`: the official code's joint Adam step on A, B and core, then one group a block. Both yield the loss of the state as it is;
going on does the next iteration.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .armor_draws import Select, remask
from .armor_exact import fit_core, fit_left, fit_right
from .armor_state import (
    State,
    Target,
    by_columns,
    core_curvature,
    core_gradient,
    residual,
    times_left,
    times_right,
    weighed,
)

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


def exact(
    target: Target, state: State, draws: int, steps: int, select: Select, generator: torch.Generator
) -> Iterator[Tensor]:
    """draws: groups of each block remasked in an iteration. steps: of conjugate gradients on the core."""
    rest = residual(target, state)
    while True:
        yield weighed(rest, target.power)
        gradient, curvature = core_gradient(target, state, rest), core_curvature(target, state)
        del rest
        gradient = fit_core(state, gradient, curvature, steps)
        remask(target, state, gradient, curvature, draws, select, generator)
        del gradient
        fit_left(target, state)
        fit_right(target, state)
        rest = residual(target, state)


def adam(target: Target, state: State, rate: float, generator: torch.Generator) -> Iterator[Tensor]:
    """The gradient is that of the loss over the loss of an all-zero weight, as Adam's epsilon is no share of anything."""
    scale = 2 / (float(target.total) or 1.0)
    factors = (state.left, state.core, state.right)
    first, second = ([torch.zeros_like(one) for one in factors] for _ in range(2))
    step = 0
    while True:
        rest = residual(target, state)
        yield weighed(rest, target.power)
        step += 1
        slopes = _slopes(target, state, rest)
        for factor, slope, mean, square in zip(factors, slopes, first, second, strict=True):
            slope.mul_(scale)
            mean.lerp_(slope, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
            spread = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
            factor.addcdiv_(mean, spread, value=-rate / (1 - BETAS[0] ** step))
        state.core.masked_fill_(~state.keep, 0.0)  # the official core is W' * M: what is not kept may move, unseen
        gradient = core_gradient(target, state, residual(target, state))
        remask(target, state, gradient, core_curvature(target, state), 1, "gradient", generator)


def _slopes(target: Target, state: State, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half the gradients by A, by the kept entries of the core, by B."""
    weighted = rest * target.power
    pulled = times_left(state.left.mT, weighted)
    blocks, block, _ = state.left.shape
    rows = times_right(state.core, state.right).view(blocks, block, -1)
    by_left = -torch.bmm(weighted.view(blocks, block, -1), rows.mT)
    by_core = times_right(pulled, -state.right.mT).masked_fill_(~state.keep, 0.0)
    by_right = -torch.bmm(by_columns(state.core, state.right).mT, by_columns(pulled, state.right))
    return by_left, by_core, by_right


@dataclass(frozen=True)
class Fit:
    """The best state that was met, and the losses of all, each over the loss of an all-zero weight."""

    state: State
    losses: tuple[float, ...]


def fitted(
    target: Target,
    state: State,
    going: Iterator[Tensor],
    iterations: int,
    patience: int,
    relative: float,
    absolute: float,
) -> Fit:
    """At most `iterations`; ends after `patience` of them in a row that gain less than `relative` of the last loss or `absolute`."""
    total = float(target.total) or 1.0
    best, least, idle = state.copy(), float("inf"), 0
    losses: list[float] = []
    for done, now in enumerate(going):
        losses.append(float(now) / total)
        if losses[-1] < least:
            least = losses[-1]
            for kept, one in (
                (best.left, state.left),
                (best.core, state.core),
                (best.right, state.right),
                (best.keep, state.keep),
            ):
                kept.copy_(one)
        if done:
            gained = losses[-2] - losses[-1]
            idle = idle + 1 if gained < max(relative * losses[-2], absolute) else 0
        if done == iterations or idle >= patience or losses[-1] == 0:
            break
    return Fit(best, tuple(losses))
