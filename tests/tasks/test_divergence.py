"""How far predictions have moved: by hand, and on every kind of output."""

import math

import pytest
import torch
from torch import nn

from layerwise.errors import DataError, ModelError, ScoreError
from layerwise.evaluate import divergence
from layerwise.tasks import Batches, Yardstick
from layerwise.tasks.divergence import kl_rows, predictions
from models import MODELS, inputs_for


class _Counting(nn.Module):
    def forward(self, x):
        return {"count": len(x)}


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    by_hand = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]  # the second: 0 log 0 counts nothing
    assert kl_rows(p.log(), q.log()).tolist() == pytest.approx(by_hand, abs=1e-6)
    assert kl_rows(q.log()[:1], q.log()[:1]).item() == 0.0


def test_equals_the_divergence_that_is_reported():
    dense, other = MODELS["llama"](), MODELS["llama"]().eval()
    ids = torch.arange(24).reshape(2, 12) % dense.config.vocab_size
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.8)
    # the report leaves the last position out, which predicts nothing of the window: give it one position less to see
    reported = divergence(other, Batches(({"input_ids": ids},), {}), against=dense.eval()).kl
    found = Yardstick(dense, [{"input_ids": ids[:, :-1]}]).divergences(other)
    assert found == pytest.approx([reported], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", 24), ("t5", 14), ("vit", 2), ("clip", 2), ("cifar_resnet", 2), ("dit", 2)]
)
def test_every_kind_of_output_has_rows(name, rows):
    model = MODELS[name]().eval()
    batch = inputs_for(name, model, seed=0)
    with torch.no_grad():
        found, logits = predictions(model, batch)
    assert len(found) == rows
    assert logits == (found.ndim == 2) == (name != "dit")
    yardstick = Yardstick(model, [batch])
    assert yardstick.divergences(model) == pytest.approx([0.0], abs=1e-7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    assert yardstick.divergences(model)[0] > 0


def test_padding_does_not_count():
    model = MODELS["llama"]().eval()
    ids = torch.arange(12).reshape(1, 12)
    mask = torch.tensor([[1] * 8 + [0] * 4])
    with torch.no_grad():
        assert len(predictions(model, {"input_ids": ids, "attention_mask": mask})[0]) == 8


def test_many_predictions_are_thinned_out_and_say_so():
    model = MODELS["llama"]().eval()
    ids = torch.arange(24).reshape(2, 12)
    size = 24 * model.config.vocab_size
    batches = [{"input_ids": ids}, {"input_ids": ids}]
    assert Yardstick(model, batches, most=2 * size).every == 1
    third = Yardstick(model, batches, most=size * 2 // 3)
    assert third.every == 3
    assert third.divergences(model) == pytest.approx([0.0, 0.0], abs=1e-7)


def test_other_outputs_are_judged_by_their_relative_squared_error():
    doubled, halved = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(doubled.weight, 2.0)
    nn.init.constant_(halved.weight, 1.0)
    assert Yardstick(doubled, [{"x": torch.ones(2, 1, 3, 3)}]).divergences(halved) == [0.25]


def test_what_cannot_be_compared_is_said():
    with pytest.raises(DataError, match="no batch"):
        Yardstick(MODELS["llama"](), [])
    with pytest.raises(ModelError, match="gives no tensor of numbers"):
        predictions(_Counting(), {"x": torch.ones(1)})
    broken = MODELS["llama"]()
    nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ScoreError, match="batch 1"):
        Yardstick(broken, [{"input_ids": torch.arange(5)[None]}])


def test_a_model_that_overflows_is_infinitely_far():
    dense, broken = MODELS["llama"]().eval(), MODELS["llama"]().eval()
    nn.init.constant_(broken.lm_head.weight, math.inf)
    assert Yardstick(dense, [{"input_ids": torch.arange(5)[None]}]).divergences(broken) == [math.inf]
