"""From the tails of spectra to a plan: what AlphaPruning and FARMS share. They differ in which spectrum is fitted.

A layer's alpha is small where its spectrum has a heavy tail, which is read as trained well: it keeps more. The sign is turned here, once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import nn

from ..allocate import check_feasible, linear_factors, water_fill
from ..errors import ConfigError, ModelError
from ..plan import Plan
from ..scores import FITS, Fit, LayerTail, Look, layer_tails
from ..structure import Layer, Structure, groups_of
from .assemble import found, plan_of, sizes_of
from .base import Method, check_sparsities

Per = Literal["block", "layer"]
Excess = Literal["fill", "clamp"]


class ByAlpha(Method, Protocol):
    """The settings that both methods have."""

    @property
    def sparsity(self) -> float: ...
    @property
    def spread(self) -> float: ...
    @property
    def fit(self) -> Fit: ...
    @property
    def per(self) -> Per: ...
    @property
    def excess(self) -> Excess: ...
    @property
    def min_sparsity(self) -> float: ...
    @property
    def max_sparsity(self) -> float: ...


def check_settings(method: ByAlpha) -> None:
    """Raise ConfigError for a setting out of its range."""
    owner = type(method).__name__
    check_sparsities(owner, method.sparsity, method.min_sparsity, method.max_sparsity)
    if not 0 <= method.spread < 1:  # at 1 the factor of the smallest alpha is 0, which no scale brings to a budget
        raise ConfigError(
            f"{owner}.spread={method.spread:g}: sparsities are the target times 1 ± spread: give 0 <= spread < 1."
        )
    words: dict[str, tuple[str, Sequence[str]]] = {
        "fit": (method.fit, FITS),
        "per": (method.per, ("block", "layer")),
        "excess": (method.excess, ("fill", "clamp")),
    }
    for name, (word, known) in words.items():
        if word not in known:
            raise ConfigError(f'{owner}.{name}="{word}": give {", ".join(known[:-1])} or {known[-1]}.')
    _check_clamp(method)


def _check_clamp(method: ByAlpha) -> None:
    """The clamp has caps of its own, so bounds of one's own would go unheeded."""
    bounds = [name for name in ("min_sparsity", "max_sparsity") if getattr(method, name) != getattr(type(method), name)]
    if method.excess == "clamp" and bounds:
        raise ConfigError(
            f'{type(method).__name__}.{bounds[0]}={getattr(method, bounds[0]):g} has no effect with excess="clamp", which has caps of its'
            ' own. Leave it out, or use excess="fill".'
        )


def looked_at(method: ByAlpha, structure: Structure) -> list[Layer]:
    """The layers whose alphas count: those outside the blocks get the target where sparsity is shared out over blocks."""
    return [layer for layers in groups_of(structure, method.per).values() for layer in layers]


def plan_by_tails(
    method: ByAlpha, model: nn.Module, structure: Structure | None, look: Look, said: Sequence[str] = ()
) -> Plan:
    """One sparsity per block, or per layer: the target times 1 ± spread, larger where alpha is. The plan's scores are alphas (low = keep).

    A block's alpha is the mean of its layers'. Layers without one, and blocks without such layers, are named in the plan's notes; a block
    without any gets the target, as layers outside the blocks do. said: notes of the method's own.
    """
    structure = found(model, structure)
    sizes = sizes_of(structure)
    groups = _groups(method, model, structure)
    if method.excess == "fill":
        check_feasible(sizes, method.sparsity, method.min_sparsity, method.max_sparsity)  # before the work
    tails = list(layer_tails(model, looked_at(method, structure), look))
    alphas = {tail.name: tail.alpha for tail in tails if tail.alpha is not None}
    by_group = group_alphas(alphas, groups)
    held = {group: sum(sizes[name] for name in groups[group]) for group in by_group}
    notes = _notes(tails, by_group, groups)
    shares, more = group_sparsities(method, by_group, held)
    home = {name: group for group, names in groups.items() for name in names}
    sparsities = {name: shares.get(home.get(name, ""), method.sparsity) for name in sizes}
    low, high, target = method.min_sparsity, method.max_sparsity, method.sparsity
    if method.excess == "clamp":  # its budget is what comes out
        low, high = 0.0, 1.0
        target = math.fsum(sparsities[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return plan_of(method, model, structure, target, sparsities, low, high, alphas, (*said, *notes, *more))


def group_alphas(alphas: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Group -> plain mean of the alphas of its layers; groups without any are not in the result."""
    having = {group: [alphas[name] for name in names if name in alphas] for group, names in groups.items()}
    return {group: math.fsum(some) / len(some) for group, some in having.items() if some}


def group_sparsities(
    method: ByAlpha, alphas: Mapping[str, float], sizes: Mapping[str, int]
) -> tuple[dict[str, float], list[str]]:
    """Sparsities by size-weighted mean `method.sparsity`, and notes. alphas: of blocks or layers, small = keep.

    excess="fill": what is above the cap goes to the others, all scaled alike. "clamp": as in FARMS's code, what is above 1 becomes 0.998
    (0.99999 at a target of 0.7) and the budget is missed by the rest.
    """
    if not alphas:
        return {}, []
    notes = ["all alphas are equal: uniform"] if len(alphas) > 1 and len(set(alphas.values())) == 1 else []
    factors = linear_factors({name: -alpha for name, alpha in alphas.items()}, method.spread)
    total = method.sparsity * sum(sizes.values())
    mean = math.fsum(factors[name] * size for name, size in sizes.items()) / sum(sizes.values())
    plain = {name: method.sparsity / mean * factor for name, factor in factors.items()}
    if method.excess == "clamp":
        cap = 0.99999 if method.sparsity == 0.7 else 0.998
        clamped = {name: cap if share > 1 else share for name, share in plain.items()}
        over = sum(share > 1 for share in plain.values())
        got = math.fsum(clamped[name] * size for name, size in sizes.items()) / sum(sizes.values())
        if over:
            notes.append(f"{over} of {len(plain)} clamped to {cap:g}: {got:.4%} instead of {method.sparsity:.4%}")
        return clamped, notes
    over = sum(share > method.max_sparsity for share in plain.values())
    if over:
        notes.append(
            f"{over} of {len(plain)} would be above max_sparsity={method.max_sparsity:g}; the others take their part"
        )
    return water_fill(factors, sizes, total, method.min_sparsity, method.max_sparsity, by="scale"), notes


def _groups(method: ByAlpha, model: nn.Module, structure: Structure) -> dict[str, list[str]]:
    """What gets a sparsity of its own -> its layers."""
    groups = {name: [layer.name for layer in layers] for name, layers in groups_of(structure, method.per).items()}
    if not groups:
        raise ModelError(
            f"{type(method).__name__} shares sparsity out over blocks, and {type(model).__name__} has none with layers up for"
            ' compression. Share it out over layers: per="layer" (--set per=layer).'
        )
    return groups


def _notes(tails: Sequence[LayerTail], found: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> list[str]:
    notes = [f"{tail.name}: {tail.note}" for tail in tails if tail.note]
    if not found:
        return [*notes, "no layer has an alpha: uniform"]
    return [
        *notes,
        *(f"{name}: none of its layers has an alpha, it gets the target" for name in groups if name not in found),
    ]
