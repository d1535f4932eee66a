"""Which blocks a period of training takes, and how often each is taken: of probabilities, without a model.

`exact` takes exactly so many, one after the other without putting back, as the code of OwLore and LISA does; `independent` lets a coin
decide for each, as OwLore's text has it: their number then varies, and may be none. A block's draw depends on the seed, the period and
its own name alone, so nothing has to be kept to go on, and every process draws the same.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch

from ..errors import ConfigError
from ..randomness import generator_for

Draw = Literal["exact", "independent"]


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Name -> weight over the sum of all. Raises ConfigError unless all are finite and at least 0, and one is above."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f'the probability of "{name}" is {weight:g}: give a finite number, at least 0.')
    total = math.fsum(weights.values())
    if not total > 0:
        raise ConfigError(
            "every block has probability 0, so none can be drawn. Give some of them more, or all the same."
        )
    return {name: weight / total for name, weight in weights.items()}


def check_draw(probabilities: Mapping[str, float], blocks: int, draw: str) -> None:
    """Raise ConfigError unless so many blocks can be drawn."""
    if draw not in get_args(Draw):
        raise ConfigError(f'draw="{draw}": give exact or independent.')
    able = sum(value > 0 for value in probabilities.values())
    if not 1 <= blocks <= able:
        zero = len(probabilities) - able
        without = f" ({zero} more have probability 0)" if zero else ""
        raise ConfigError(f"blocks={blocks}: {able} blocks can be drawn{without}. Give 1 to {able}.")


def drawn(probabilities: Mapping[str, float], blocks: int, draw: Draw, seed: int, period: int) -> set[str]:
    """The blocks of one period. probabilities: sum 1."""
    chances = {
        name: torch.rand((), generator=generator_for(seed, f"sampling:{period}:{name}"), dtype=torch.float64).item()
        for name in probabilities
    }
    if draw == "independent":
        return {name for name, chance in chances.items() if chance < min(1.0, blocks * probabilities[name])}
    # exponential clocks of rate p: the first of them to ring is a draw by p, the next one a draw among the rest, and so on
    rings = {name: -math.log1p(-chances[name]) / value for name, value in probabilities.items() if value > 0}
    return set(sorted(rings, key=lambda name: (rings[name], name))[:blocks])


def inclusion(probabilities: Mapping[str, float], blocks: int, draw: Draw = "exact") -> dict[str, float]:
    """Name -> probability of being trained in a period. `exact`: they sum to `blocks`, and are not `blocks` times the probability.

    The integral over the time t at which a block's clock rings, of the chance that fewer than `blocks` others have rung by then;
    by the trapezoid rule in log t, with an error far below 1e-6.
    """
    if draw == "independent":
        return {name: min(1.0, blocks * value) for name, value in probabilities.items()}
    names = [name for name, value in probabilities.items() if value > 0]
    if len(names) <= blocks:
        return {name: float(value > 0) for name, value in probabilities.items()}
    rates = torch.tensor([probabilities[name] for name in names], dtype=torch.float64)
    step = 0.02
    ends = math.log(1e-9 / float(rates.max())), math.log(50 / float(rates.min()))
    times = torch.arange(ends[0], ends[1], step, dtype=torch.float64).exp()
    before = -torch.expm1(-rates[:, None] * times)  # (block, time): has rung
    found = {}
    for index, name in enumerate(names):
        counts = torch.zeros(blocks, len(times), dtype=torch.float64)  # (others that have rung, time)
        counts[0] = 1
        for other in range(len(names)):
            if other != index:
                rung = before[other] * counts[:-1]
                counts *= 1 - before[other]
                counts[1:] += rung
        density = rates[index] * torch.exp(-rates[index] * times) * times
        found[name] = float((density * counts.sum(0)).sum()) * step
    return {name: min(1.0, found.get(name, 0.0)) for name in probabilities}
