"""Where sparse training from scratch starts: random masks of exact counts, and the initialisation of the dense layers.

Every layer draws from a stream of its own, keyed by seed and name: another layer, or another shape of one, changes no other draw, and
every process draws the same without talking to the others. Source: Liu et al. 2022, arXiv:2202.02643, whose masks are coins (the count is
random) and differ between processes.
"""

import math

import torch
from torch import Tensor, nn

from ..engine.solving import per_matrix
from ..plan import Plan
from ..randomness import generator_for
from ..solvers import Random
from ..structure import Structure, as_matrices, from_matrices, parameter_of


def random_masks(plan: Plan, structure: Structure, seed: int = 0) -> dict[str, Tensor]:
    """Layer name -> bool mask in the stored shape, True = kept, for every layer of `structure` that the plan prunes.

    The masks that the solver `random` makes of the same plan and seed: exact counts, all positions alike, in the plan's patterns;
    of an experts tensor or a grouped convolution each matrix loses its share. A layer that loses nothing has a mask of ones.
    """
    solver, keep = Random(), {}
    for layer in structure:
        prune = plan.layers[layer.name].prune if layer.name in plan.layers else None
        if prune is None:
            continue
        ones = torch.ones(layer.rows, layer.columns)
        streams = [generator_for(seed, f"{layer.name}:{index}") for index in range(layer.matrices)]
        shares = per_matrix(layer, prune)
        solved = [solver.solve([ones], None, [p], [g])[0].keep for p, g in zip(shares, streams, strict=True)]
        keep[layer.name] = from_matrices(torch.stack(solved), layer).contiguous()
    return keep


@torch.no_grad()
def kaiming_normal(model: nn.Module, structure: Structure, seed: int = 0) -> None:
    """Draw the weights of these layers anew, in place: deviation sqrt(2 / fan in), of the dense layer, whatever is pruned of it.

    Biases become zero. Nothing is scaled up for the density, as in the paper's runs.
    """
    for layer in structure:
        parameter = parameter_of(model, layer)
        shape = as_matrices(parameter.detach(), layer).shape
        drawn = torch.randn(shape, generator=generator_for(seed, f"kaiming:{layer.name}"))
        parameter.copy_(from_matrices(drawn * math.sqrt(2 / layer.columns), layer))
        owner = model.get_submodule(layer.parameter.rpartition(".")[0])
        if isinstance(bias := getattr(owner, "bias", None), nn.Parameter):
            bias.zero_()
