"""LPViT as its code decides: one averaged gradient, smoothed curves, equal slopes (see `lpvit` and `allocate.equal_slope`).

Defaults are those of the code: 100 steps, smoothing 0.5, stencil of half-width 4, at least 5 % of each layer kept, the budget within 2 %,
counted in the whole blocks that stay (in the code in hundredths of each layer, which small layers cannot keep).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from ..allocate import equal_slope, smoothed
from ..plan import Budget, Plan, Prune
from ..scores import block_means, gradients, official_curve, squared_outputs, taylor_keep
from ..structure import Layer, Structure, as_matrices, parameter_of
from ..tasks.batches import Batches, first_samples
from ..treatments import kept_text
from .assemble import block_of, named_plan
from .base import Method
from .block_costs import BlockCosts

STEPS, SMOOTHING, HALF, MIN_KEPT, TOLERANCE = 100, 0.5, 4, 0.05, 0.02


class Settings(Method, Protocol):
    """What is read of the method."""

    @property
    def sparsity(self) -> float: ...
    @property
    def pattern(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def energy(self) -> float: ...


def reference_plan(
    method: Settings,
    model: nn.Module,
    data: Batches,
    structure: Structure,
    layers: Sequence[Layer],
    costs: BlockCosts,
) -> Plan:
    """The plan of the official objective. energy: any share above 0 switches its power term on. Raises BudgetError beyond 2 %."""
    shape, chosen = block_of("LPViT", method.pattern), first_samples(data, method.samples)
    mean = gradients(model, chosen, structure, loss=squared_outputs)
    keeps, curves = {}, {}
    for layer in layers:
        weight = as_matrices(parameter_of(model, layer).detach(), layer).float().flatten(0, 1)
        gradient = as_matrices(mean[layer.name], layer).flatten(0, 1) / len(chosen)
        keeps[layer.name] = block_means((weight * gradient).abs(), shape)
        curves[layer.name] = smoothed(official_curve(weight, gradient, shape, STEPS), SMOOTHING)
    macs = costs.each("macs")
    whole = {name: macs[name] * costs.blocks[name] for name in curves}
    power = {layer.name: float(costs.blocks[layer.name] * (layer.columns // 16)) for layer in layers}
    gone = equal_slope(
        curves,
        whole,
        1 - method.sparsity,
        half=HALF,
        min_kept=MIN_KEPT,
        tolerance=TOLERANCE,
        power=power if method.energy > 0 else None,
        blocks=costs.blocks,
    )
    prunes = {}
    for name, fraction in gone.items():
        keep = taylor_keep(keeps[name], fraction).flatten()
        sparsity = 1 - int(keep.sum()) / len(keep)
        prunes[name] = Prune(sparsity=sparsity, pattern=method.pattern, kept=kept_text(keep.tolist()))
    kept = {name: costs.blocks[name] - round(one.sparsity * costs.blocks[name]) for name, one in prunes.items()}
    scores = {name: float(torch.nan_to_num(of).mean()) for name, of in keeps.items()}
    budget = Budget(flops=2 * (1 - method.sparsity + TOLERANCE) * costs.total("macs"))
    return named_plan(method, model, structure, budget, prunes, scores, [costs.sentence(kept)])
