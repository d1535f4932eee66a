"""Run by `torchrun` from test_ranks.py: compress a tiny model on several processes, rank 0 saves what came out."""

import os
import sys

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerwise.engine import Ranks, Settings, compress
from layerwise.plan import Plan, Prune, Quantize
from layerwise.solvers import SOLVERS
from layerwise.structure import parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).relu() * self.up(x))


class Routed(nn.Module):
    """A block of two experts, each a module of its own: a batch of positive mean goes to the one, of negative mean to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(8), nn.ModuleList([Expert(), Expert()])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts[int(x.mean() < 0)](self.norm(x))


def routed() -> tuple[nn.Module, Batches]:
    """With two processes every batch of one rank goes to the first expert, every batch of the other to the second."""
    torch.manual_seed(0)
    model = nn.Sequential(Routed(), Routed())
    for parameter in model.parameters():
        parameter.data *= 0.5  # the sign of a batch outlives a block
    inputs = [torch.randn(1, 40, 8) + 4 * (-1) ** index for index in range(4)]
    return model, Batches(tuple({"input": one} for one in inputs), {})


def main(name: str, solver: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join()
    if name == "routed":
        model, data = routed()
    else:
        model = MODELS[name]().eval()
        data = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(5)), {})
    structure = structure_of(model)
    way = Quantize(bits=3, group=8) if "quantize" in SOLVERS[solver].treats else Prune(sparsity=0.6)
    plan = Plan(layers={layer.name: way for layer in structure.layers})
    result = compress(model, plan, solver=SOLVERS[solver](), data=data, settings=Settings(work=f"{out}.work"))
    assert len(result.layers) == len(structure.layers)
    weights = {layer.name: parameter_of(model, layer).detach().contiguous() for layer in structure.layers}
    for name, codes in result.codes.items():
        weights |= {f"{name} {part}": getattr(codes, part) for part in ("values", "scale", "zero")}
    if ranks.size > 1:  # every rank ends with the same model
        for weight in weights.values():
            mine = weight.clone()
            ranks.share(mine, 0)
            assert torch.equal(mine, weight)
    if ranks.rank == 0:
        save_file(weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # as `python -m layerwise` does, and for the same reason
