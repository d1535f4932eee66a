"""Run by `torchrun` from test_ranks.py: compress a tiny model on several processes, rank 0 saves what came out."""

import sys

import torch
from safetensors.torch import save_file

from layerwise.engine import Ranks, Settings, compress
from layerwise.plan import Plan, Prune
from layerwise.solvers import SOLVERS
from layerwise.structure import parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def main(name: str, solver: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join()
    model = MODELS[name]().eval()
    structure = structure_of(model)
    plan = Plan(layers={layer.name: Prune(sparsity=0.6) for layer in structure.layers})
    data = Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(5)), {})
    result = compress(model, plan, solver=SOLVERS[solver](), data=data, settings=Settings(work=f"{out}.work"))
    assert len(result.layers) == len(structure.layers)
    weights = {layer.name: parameter_of(model, layer).detach().contiguous() for layer in structure.layers}
    if ranks.size > 1:  # every rank ends with the same model
        for weight in weights.values():
            mine = weight.clone()
            ranks.share(mine, 0)
            assert torch.equal(mine, weight)
    if ranks.rank == 0:
        save_file(weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
