"""What the scores of weights hold beside the model, in bytes for each weight: not the gradients of a whole model."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerwise.methods import SynFlow
from layerwise.scores import first_order_gradient, grasp_scores, snip_scores, synflow_scores
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches

LAYERS, WIDTH = 16, 64
SHARE = 1 / LAYERS  # of a layer


class Held(TorchDispatchMode):
    """The most bytes of tensors that lived together, of those made within."""

    def __init__(self, model):
        super().__init__()
        self._old = {one.untyped_storage()._cdata for one in model.parameters()}
        self._made, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in self._old:
                storage = one.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {key: pair for key, pair in self._made.items() if not pair[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


def half_square(model, batch):
    return model(batch["input"]).float().square().sum() / 2


# what stays (scores, and of GraSP g and half of H g; of SynFlow in rounds two masks), and how many bytes the work on one layer takes
HELD = {
    "first order": (lambda *given: first_order_gradient(*given, loss=half_square), 0, 16),
    "snip": (lambda *given: snip_scores(*given, loss=half_square), 4, 12),
    "grasp": (lambda *given: grasp_scores(*given, temperature=1, loss=half_square), 12, 16),
    "synflow": (lambda *given: synflow_scores(*given), 8, 32),
    "synflow in rounds": (lambda m, d, s: SynFlow(rounds=3).plan(m, d, structure=s), 8 + 2, 32),
}


@pytest.mark.parametrize(("score", "stays", "of_one_layer"), HELD.values(), ids=list(HELD))
def test_gradients_are_not_held_beside_the_scores(score, stays, of_one_layer, monkeypatch):
    monkeypatch.setattr("layerwise.solvers.pooled.DIGIT", 8)  # else its counts outweigh so small a model
    monkeypatch.setattr("layerwise.solvers.pooled.CHUNK", 512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
        model, inputs = nn.Sequential(*parts), torch.rand(2, 1, WIDTH)
    data = Batches(tuple({"input": one} for one in inputs), {})
    structure = structure_of(model, include=["*"])
    with Held(model) as held:
        score(model, data, structure)
    each = held.most / (LAYERS * WIDTH * WIDTH)
    assert stays <= each < stays + of_one_layer * SHARE + 0.7  # activations
