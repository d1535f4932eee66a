"""FLAP's statistics in worked numbers, and what compensation leaves."""

import pytest
import torch

from layerwise.errors import ScoreError, WalkError
from layerwise.scores.fluctuation import Moments, Running, fluctuations, moments, running
from layerwise.structure import coupled_groups
from models import MODELS, inputs_for

SEQUENCES = [torch.tensor([[1.0], [3]]), torch.tensor([[2.0], [6]]), torch.tensor([[0.0], [4]])]


def test_the_official_running_statistic():
    one = Running.of(1)
    one.meet(SEQUENCES)
    assert float(one.mean) == pytest.approx(2.666667, abs=1e-6)
    assert float(one.variance) == pytest.approx(5.462963, abs=1e-6)
    assert float(one.power) == pytest.approx((1 + 9 + 4 + 36 + 0 + 16) / 3)


def test_exact_moments():
    one = Moments.of(1)
    one.meet(SEQUENCES)
    assert float(one.mean) == pytest.approx(2.666667, abs=1e-6)
    assert float(one.variance) == pytest.approx(3.888889, abs=1e-6)


def test_removing_with_the_mean_in_its_place_costs_the_variance():
    """Check 4: the mean squared error is var |w|^2, without compensation mean(z^2) |w|^2."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(500, 4, generator=draw, dtype=torch.float64) + torch.tensor([0.0, 3, -1, 2], dtype=torch.float64)
    weight = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    one = Moments.of(4)
    one.add(z)
    for gone in range(4):
        lost = z[:, gone : gone + 1] @ weight[:, gone : gone + 1].T
        bias = one.mean[gone] * weight[:, gone]
        with_it, without = ((lost - more).square().sum(1).mean() for more in (bias, 0))
        size = weight[:, gone].square().sum()
        torch.testing.assert_close(with_it, one.variance[gone] * size)
        torch.testing.assert_close(without, z[:, gone].square().mean() * size)
        assert with_it <= without


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_inputs_of_the_readers_are_what_is_measured(name):
    model = MODELS[name]().eval()
    groups = coupled_groups(model).groups
    data = [inputs_for(name, model, seed=seed) for seed in range(2)]
    found = moments(model, data, groups)
    group = next(one for one in groups if one.kind == "channels")
    reader = next(part for part in group.parts if part.side == "in")
    rows = []
    module = model.get_submodule(reader.parameter.rpartition(".")[0])
    handle = module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    together = torch.cat(rows).double()
    if all("attention_mask" not in batch for batch in data):
        torch.testing.assert_close(found[reader.parameter].mean, together.mean(0))
        torch.testing.assert_close(found[reader.parameter].variance, together.var(0, correction=0))
    for kind in ("wifv", "ifv", "wifn"):
        scores = fluctuations(model, groups, found, kind)
        assert all(scores[one.name].shape[0] == one.units and (scores[one.name] >= 0).all() for one in groups)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_does_not_count(name):
    model = MODELS[name]().eval()
    groups = coupled_groups(model).groups
    ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    for kind in (moments, running):
        found = kind(model, [{"input_ids": ids, "attention_mask": mask}], groups)
        assert {one.count for one in found.values()} == {13}


def test_encoder_and_decoder_have_padding_of_their_own():
    """Of the same length here, so that one mask would fit the other's tokens."""
    model = MODELS["t5"]().eval()
    groups = [group for group in coupled_groups(model).groups if group.kind == "channels"]
    ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(1)}
    batch["attention_mask"][1, 5:] = 0
    counts = []
    for decoder in (None, 2):
        more = {}
        if decoder is not None:
            more["decoder_attention_mask"] = torch.ones_like(ids)
            more["decoder_attention_mask"][:, -decoder:] = 0
        found = moments(model, [{**batch, **more}], groups)
        counts.append({name.split(".")[0]: one.count for name, one in found.items()})
    assert counts == [{"encoder": 13, "decoder": 16}, {"encoder": 13, "decoder": 12}]


def test_running_takes_sequence_by_sequence():
    """Two sequences in a batch are as in two batches."""
    model = MODELS["llama"]().eval()
    groups = coupled_groups(model).groups
    ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    together = running(model, [{"input_ids": ids}], groups)
    apart = running(model, [{"input_ids": one} for one in ids.split(1)], groups)
    for name, one in together.items():
        assert one.sequences == apart[name].sequences == 2
        torch.testing.assert_close(one.variance, apart[name].variance, rtol=1e-5, atol=1e-9)


def test_fused_experts_are_refused():
    model = MODELS["mixtral"]()
    with pytest.raises(ScoreError, match="inside fused experts"):
        moments(model, [inputs_for("mixtral", model, seed=0)], coupled_groups(model).groups)


def test_what_the_model_cannot_run_on_is_one_line():
    model = MODELS["llama"]()
    groups = coupled_groups(model).groups
    batches = [inputs_for("llama", model), {"input_ids": torch.full((1, 4), 10_000)}]
    with pytest.raises(WalkError, match="cannot run on batch 1: IndexError"):
        moments(model, batches, groups)
