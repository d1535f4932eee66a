"""ARMOR: a weight as A S B, S a sparse n:m core, A and B block-diagonal (Liu et al. 2026, arXiv:2510.05528; LawrenceRLiu/ARMOR).

Needs column sums of squared inputs; no gradients of the model. Starts at NoWag-P with A = B = I, so that it is never worse.
`reference=True` is the official form: Adam on A, B and S together, one group of each block remasked at a time.
Departures of the default: D1 A and B are solved exactly, S by conjugate gradients, each block for itself; the loss never rises,
which joint Adam does not give. D2 several groups of each block are remasked in an iteration: those that gain most, exactly
computed. D3 damping is a share of what it damps. D4 normalisation and dead inputs as in `nowag`. Of both forms: D5 the best state
is returned, not the last. D6 scales are folded into A and B block by block, with powers of two in between, so that float16 holds
them; after A and B are rounded to the dtype they are stored in, S is fitted once more. The official damping by 1e-9 and 1e-8 is
not reproduced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError, SolveError
from ..passes.statistics import InputStatistics, Need
from ..plan import Factorize
from .armor_draws import Select
from .armor_exact import fit_core
from .armor_fit import Fit, adam, exact, fitted
from .armor_state import State, Target, core_curvature, core_gradient, loss, residual, start
from .base import FACTORIZES, Solved, Treated, checked
from .factors import Factors
from .masking import calibrated, check_weights
from .nowag import EPSILON, Normalised, normalise, power_of
from .select import keep_nm

Storage = Literal["auto", "float32", "bfloat16", "float16"]
REFIT = 4  # steps of conjugate gradients after rounding
WORSE = 1e-3  # by which rounding may raise the relative loss without a word


@dataclass(frozen=True)
class ARMOR:
    """Block-diagonal factors around an n:m core. Defaults: the monotone form; the paper's iterations are Adam's."""

    name: ClassVar[str] = "armor"
    needs: ClassVar[Need] = "squares"
    treats: ClassVar[frozenset[str]] = FACTORIZES
    every_pattern: ClassVar[bool] = False

    iterations: int = 0  # at most; 0: 100, of the reference 20000
    draws: int = 16  # groups of each block remasked in an iteration, at most one in 32; the reference does 1
    steps: int = 2  # of conjugate gradients on the core in an iteration
    select: Select = "gain"  # which groups: of most gain, drawn by the size of their gradients, or uniformly
    tolerance: float = 1e-4  # relative gain of an iteration that counts as none
    patience: int = 5  # iterations without gain in a row that end the fit
    storage: Storage = "auto"  # dtype of the stored factors; auto: the model's
    reference: bool = False  # joint Adam, as published
    rate: float = 1e-4  # of Adam

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.draws < 0 or self.steps < 1 or self.patience < 1:
            raise ConfigError(
                f"ARMOR.iterations={self.iterations}, draws={self.draws}, steps={self.steps}, patience={self.patience}: give whole"
                " numbers, iterations and draws from 0, the others from 1."
            )
        if self.select not in ("gain", "gradient", "uniform"):
            raise ConfigError(f'ARMOR.select="{self.select}": give "gain", "gradient" or "uniform".')
        if self.storage not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f'ARMOR.storage="{self.storage}": give auto, float32, bfloat16 or float16.')
        if not (self.tolerance >= 0 and self.rate > 0):
            raise ConfigError(f"ARMOR.tolerance={self.tolerance}, rate={self.rate}: give 0 or more, and above 0.")

    def solve(
        self,
        weights: Sequence[Tensor],
        inputs: InputStatistics | None,
        treatments: Sequence[Treated],
        generators: Sequence[torch.Generator],
    ) -> list[Solved]:
        """See `Solver.solve`. Raises ShapeError, or SolveError for weights or inputs that are not finite, or factors that overflow."""
        inputs = calibrated("ARMOR", inputs)
        every = checked(self, treatments)
        check_weights(weights, inputs)
        power, note = power_of(inputs, reference=self.reference)
        notes = (note,) if note else ()
        solved = []
        for weight, one, generator in zip(weights, every, generators, strict=True):
            assert one.factorize is not None  # noqa: S101  (checked: it does nothing else)
            if problem := one.factorize.problem(*weight.shape):
                raise ShapeError(problem)
            factors, more = self._factors(weight, power, one.factorize, generator)
            keep = torch.ones_like(weight, dtype=torch.bool)  # the product has no zeros of its own
            solved.append(Solved(factors.weight(), keep, None, (*notes, *more), factors=factors))
        return solved

    def _factors(
        self, weight: Tensor, power: Tensor, way: Factorize, generator: torch.Generator
    ) -> tuple[Factors, tuple[str, ...]]:
        n, m = way.nm
        scaled = normalise(weight, EPSILON if self.reference else 0.0)
        target = Target(scaled.weight, power.to(weight.dtype), way.block, n, m)
        fit = self.fit(target, generator)
        dtype = weight.dtype if self.storage == "auto" else getattr(torch, self.storage)
        factors, stored = folded(target, fit.state, scaled, dtype)
        before = min(fit.losses)
        if not stored <= before + WORSE:
            worse = f"from {before:.4f} to {stored:.4f} of the weight's own"
            return factors, (
                f"rounding the factors to {_word(dtype)} raised the loss {worse}: a dtype of more range would help",
            )
        return factors, ()

    def fit(self, target: Target, generator: torch.Generator) -> Fit:
        """The loop alone, from NoWag-P on, in normalised space."""
        state = start(target, keep_nm(target.weight.square() * target.power, target.n, target.m))
        if self.reference:
            going = adam(target, state, self.rate, generator)
            return fitted(target, state, going, self.iterations or 20000, 100, 1e-6, 1e-8)
        going = exact(target, state, self.draws, self.steps, self.select, generator)
        return fitted(target, state, going, self.iterations or 100, self.patience, self.tolerance, 0.0)


def folded(target: Target, state: State, scaled: Normalised, dtype: torch.dtype) -> tuple[Factors, float]:
    """The factors of the weight itself in `dtype`, and their relative loss. state: A, B and core of the normalised weight; changed.

    The norms go into A and B; each of their blocks is then divided by a power of two to a largest entry in [1, 2), which the core takes up:
    the product is the same to the bit, and the core has the size of the weight. Once A and B are rounded, the kept entries of the core
    are fitted anew, and the better of both cores is stored. Raises SolveError if the core overflows.
    """
    block = target.block
    left = state.left * scaled.rows.view(-1, block, 1)
    right = state.right * scaled.columns.view(-1, 1, block)
    ups, downs = _powers(left), _powers(right)
    left, right = (left / ups[:, None, None]).to(dtype), (right / downs[:, None, None]).to(dtype)
    core = state.core * ups.repeat_interleave(block).unsqueeze(1) * downs.repeat_interleave(block)
    # back in normalised space, with A and B as they are stored
    wide = target.weight.dtype
    stored = State(
        left.to(wide) / scaled.rows.view(-1, block, 1),
        core,
        right.to(wide) / scaled.columns.view(-1, 1, block),
        state.keep,
    )
    best, least = core, float("inf")
    for refit in (False, True):
        if refit:
            gradient = core_gradient(target, stored, residual(target, stored))
            fit_core(stored, gradient, core_curvature(target, stored), REFIT)
        rounded = stored.core.to(dtype)
        if not rounded.isfinite().all():
            continue
        found = float(loss(target, State(stored.left, rounded.to(wide), stored.right, state.keep)))
        if found < least:
            best, least = rounded, found
    if least == float("inf"):
        raise SolveError(f"its factors overflow {_word(dtype)}. Store them in bfloat16 or float32 (storage).")
    return Factors.of(left, best + 0.0, state.keep, right, target.n, target.m), least / (float(target.total) or 1.0)


def _powers(blocks: Tensor) -> Tensor:
    """(blocks,) powers of two that bring the largest entry of each block into [1, 2); 1 for a block of zeros."""
    largest = blocks.abs().amax((1, 2))
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent - 1
    return torch.ldexp(torch.ones_like(largest), exponent)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
