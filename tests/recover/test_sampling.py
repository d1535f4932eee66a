"""Blocks in turn, in a plain loop: what is frozen does not move, the optimiser's state does as told, a run goes on in the same bits."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from layerwise.errors import ConfigError, ModelError, PlanError, SelectionError
from layerwise.recover import LayerSampling, LowRank, LowRankAdam, Masks
from layerwise.structure import structure_of
from models import MODELS, small_llama

SCRIPT = Path(__file__).with_name("sampled.py")
BLOCKS = [f"model.layers.{index}" for index in range(4)]


def model_of_four():
    return small_llama(num_hidden_layers=4)


def batch(step):
    return torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(step))


def train(model, sampling, optimizer, steps, after=lambda step: None):
    for step in steps:
        sampling.at(step)
        ids = batch(step)
        cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()


def adam(sampling, lr=1e-2):
    groups = sampling.groups(lr)
    return LowRankAdam(groups) if sampling.low_rank else torch.optim.AdamW(groups, foreach=False)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def seed_with(history, **settings):
    """A seed whose first draws are these."""
    for seed in range(2000):
        sampling = LayerSampling(model_of_four(), blocks=1, period=2, seed=seed, **settings)
        if all(sampling.drawn(period) == (BLOCKS[index],) for period, index in enumerate(history)):
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def seed():
    return seed_with((1, 1, 3))


@pytest.mark.parametrize("low_rank", [None, LowRank(4)])
def test_over_a_period_what_is_not_drawn_does_not_move(low_rank):
    model = model_of_four()
    sampling = LayerSampling(model, blocks=2, period=3, low_rank=low_rank)
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    for period in range(3):
        before = weights(model)
        frozen = []

        def seen(step):
            frozen.append({name for name, one in model.named_parameters() if one.grad is None})

        train(model, sampling, optimizer, range(3 * period, 3 * period + 3), seen)
        assert sampling.active == sampling.drawn(period)
        drawn = {name for name in before if name.rpartition(".")[0].startswith(tuple(f"{b}." for b in sampling.active))}
        others = {name for name in before if name.startswith("model.layers.")} - drawn
        assert len(drawn) == len(others) == 18
        assert moved(model, before) == before.keys() - others
        assert frozen == [others] * 3
        assert all(one.requires_grad == (name not in others) for name, one in model.named_parameters())
    sampling.release()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("state", "entries"), [("keep", 21), ("offload", 21), ("reset", 12), (None, 12)])
def test_the_state_of_blocks_that_leave(seed, state, entries):
    """39 tensors, 9 a block; blocks 1, 1 and 3 are trained."""
    model = model_of_four()
    assert len(list(model.parameters())) == 39
    sampling = LayerSampling(model, blocks=1, period=2, seed=seed, state=state)
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    train(model, sampling, optimizer, range(6))
    assert len(optimizer.state) == entries
    assert LayerSampling(model_of_four(), low_rank=LowRank(4)).state == "keep"


def test_a_block_that_comes_back_goes_on_with_its_moments_or_without(monkeypatch):
    counts = {}
    for state in ("keep", "reset"):
        model = model_of_four()
        sampling = LayerSampling(model, blocks=1, period=2, state=state)
        monkeypatch.setattr(sampling, "drawn", lambda period: (BLOCKS[(0, 2, 0)[period]],))
        optimizer = adam(sampling)
        sampling.watch(optimizer)
        train(model, sampling, optimizer, range(6))
        weight = model.model.layers[0].mlp.up_proj.weight
        counts[state] = float(optimizer.state[weight]["step"])
    assert counts == {"keep": 4, "reset": 2}


class Elsewhere:
    """A tensor's moves are recorded: there is no second device here."""

    def __init__(self, monkeypatch):
        import layerwise.recover.sampling as module

        self.moves = []
        real = module._move

        def move(state, device):
            if state:
                self.moves.append((id(state), str(device)))
            real(state, device)

        monkeypatch.setattr(module, "_move", move)


def test_offloaded_state_goes_to_the_host_and_comes_back(monkeypatch, seed):
    found = Elsewhere(monkeypatch)
    model = model_of_four()
    sampling = LayerSampling(model, blocks=1, period=2, seed=seed, state="offload")
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    train(model, sampling, optimizer, range(2))
    found.moves.clear()
    sampling.at(2)  # block 1 again: nothing leaves
    assert len(found.moves) == 9
    train(model, sampling, optimizer, range(2, 4))
    found.moves.clear()
    sampling.at(4)
    own = {id(optimizer.state[parameter]) for parameter in model.model.layers[1].parameters()}
    assert {state for state, _ in found.moves} == own  # block 3 has no state yet
    assert "meta" not in {value.device.type for some in optimizer.state.values() for value in some.values()}


def test_moments_move_and_counters_stay():
    from layerwise.recover.sampling import _move

    state = {"step": torch.tensor(3.0), "mean": torch.ones(2), "steps": 4}
    _move(state, torch.device("meta"))
    assert (state["mean"].device.type, state["step"].device.type, state["steps"]) == ("meta", "cpu", 4)


def test_a_projector_is_new_at_every_activation(seed):
    model = model_of_four()
    sampling = LayerSampling(model, blocks=1, period=2, seed=seed, low_rank=LowRank(4))
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    weight, seen = model.model.layers[1].mlp.up_proj.weight, []
    train(model, sampling, optimizer, range(4), lambda step: seen.append(optimizer.state[weight]["projector"]))
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert not torch.allclose(seen[1], seen[2])


@pytest.mark.parametrize("always", [(), ("*norm*",), ("lm_head*", "model.embed*"), ("*",)])
def test_what_lies_outside_the_blocks_is_trained_as_said(always):
    model = model_of_four()
    before = weights(model)
    sampling = LayerSampling(model, blocks=1, period=2, always=always)
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    train(model, sampling, optimizer, range(2))
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    wanted = {(): set(), ("*norm*",): {"model.norm.weight"}, ("*",): outside}.get(
        always, outside - {"model.norm.weight"}
    )
    assert moved(model, before) & outside == wanted


def test_a_coin_for_each_block_may_leave_none_but_what_is_always_trained():
    model = model_of_four()
    sampling = LayerSampling(model, blocks=1, period=1, draw="independent", seed=1)
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    sizes = []
    train(model, sampling, optimizer, range(12), lambda step: sizes.append(len(sampling.active)))
    assert 0 in sizes
    assert max(sizes) > 1


def test_a_block_that_is_not_named_is_never_trained():
    model = model_of_four()
    before = weights(model)
    sampling = LayerSampling(model, {BLOCKS[0]: 3.0, BLOCKS[2]: 1.0}, blocks=1, period=1)
    assert sampling.probabilities == dict(zip(BLOCKS, [0.75, 0, 0.25, 0]))
    optimizer = adam(sampling)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 21
    sampling.watch(optimizer)
    train(model, sampling, optimizer, range(8))
    assert {name.split(".")[2] for name in moved(model, before) if "layers" in name} == {"0", "2"}


@pytest.mark.parametrize("state", ["keep", "reset", "offload"])
@pytest.mark.parametrize("stop", [3, 4])  # within a period, and at its end
def test_a_resumed_run_ends_in_the_same_bits(stop, state):
    def started():
        model = model_of_four()
        sampling = LayerSampling(model, blocks=2, period=2, low_rank=LowRank(4), state=state, seed=2)
        return model, sampling, adam(sampling)

    whole, sampling, optimizer = started()
    sampling.watch(optimizer)
    history = []
    train(whole, sampling, optimizer, range(8), lambda step: history.append(sampling.active))

    part, first, optimizer = started()
    first.watch(optimizer)
    train(part, first, optimizer, range(stop))
    saved = copy.deepcopy((part.state_dict(), optimizer.state_dict())), json.dumps(first.state_dict())

    again, second, optimizer = started()
    again.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    second.load_state_dict(json.loads(saved[1]))
    second.watch(optimizer)
    later = []
    train(again, second, optimizer, range(stop, 8), lambda step: later.append(second.active))
    assert later == history[stop:]
    assert len(set(history)) > 2
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_resuming_with_other_settings_shows_the_difference():
    saved = LayerSampling(model_of_four(), blocks=2, period=20, low_rank=LowRank(4)).state_dict()
    other = LayerSampling(
        model_of_four(), {**dict.fromkeys(BLOCKS, 1.0), BLOCKS[0]: 5.0}, blocks=1, low_rank=LowRank(8)
    )
    with pytest.raises(ConfigError) as caught:
        other.load_state_dict(json.loads(json.dumps(saved)))
    text = str(caught.value)
    for words in ("blocks was 2, is 1", "low_rank.rank was 4, is 8", "probabilities.model.layers.0 was 0.25, is 0.625"):
        assert words in text
    assert "period" not in text
    assert "\n" not in text
    saved["settings"]["low_rank"] = None
    with pytest.raises(ConfigError, match=r"low_rank was None, is \{'rank': 4"):
        LayerSampling(model_of_four(), blocks=2, period=20, low_rank=LowRank(4)).load_state_dict(saved)


def test_a_checkpoint_whose_blocks_would_not_be_drawn_is_refused():
    sampling = LayerSampling(model_of_four(), blocks=1)
    other = next(block for block in BLOCKS if block not in sampling.drawn(0))
    saved = {**sampling.state_dict(), "period": 0, "active": [other]}
    with pytest.raises(ConfigError, match=f"was training {other} where this run draws"):
        sampling.load_state_dict(saved)


def test_masks_hold_while_blocks_take_turns():
    model = model_of_four()
    structure = structure_of(model)
    masks = Masks(model, {layer.name: batch(7).new_ones(layer.shape, dtype=torch.bool).triu() for layer in structure})
    sampling = LayerSampling(model, blocks=2, period=2, low_rank=LowRank(4))
    optimizer = adam(sampling)
    masks.watch(optimizer)
    sampling.watch(optimizer)
    before = weights(model)
    train(model, sampling, optimizer, range(6))
    assert masks.leaked() == 0
    assert len(moved(model, before)) > 20
    masks.release()
    train(model, sampling, optimizer, range(6, 8))
    assert masks.leaked() > 0


def test_rates_of_a_plan_are_those_of_the_groups():
    sampling = LayerSampling(model_of_four(), rates={BLOCKS[1]: 0.5})
    assert {group["lr"] for group in sampling.groups(0.1)} == {0.1, 0.05}


def test_processes_train_the_same_blocks_and_stay_alike(tmp_path):
    paths = os.pathsep.join([str(SCRIPT.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(SCRIPT),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert len(set(one["history"].tolist())) > 2
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    start = dict(model_of_four().named_parameters())
    drawn = {f"model.layers.{index}." for index in one["history"].tolist()}
    for name in start:
        inside = "layers" in name
        assert torch.equal(one[name], start[name]) == (inside and not name.startswith(tuple(drawn))), name


def test_no_global_stream_is_drawn_from():
    state = torch.get_rng_state()
    sampling = LayerSampling(model_of_four(), blocks=2)
    sampling.drawn(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_optimisers_are_refused():
    model = model_of_four()
    sampling = LayerSampling(model, blocks=1)
    with pytest.raises(ConfigError, match="comes first"):
        sampling.at(0)
    few = torch.optim.AdamW([parameter for name, parameter in model.named_parameters() if "layers.0" in name])
    with pytest.raises(ConfigError, match=r"lacks 30 parameters .* before\s+anything is frozen"):
        sampling.watch(few)
    sampling = LayerSampling(model, blocks=1, low_rank=LowRank(4))
    with pytest.raises(ConfigError, match="AdamW does not project gradients"):
        sampling.watch(torch.optim.AdamW(sampling.groups(0.1)))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"blocks": 5}, ConfigError, "blocks=5: 4 blocks can be drawn. Give 1 to 4"),
        ({"blocks": 0}, ConfigError, "blocks=0"),
        ({"period": 0}, ConfigError, "period=0"),
        ({"draw": "coin"}, ConfigError, "exact or independent"),
        ({"state": "lose"}, ConfigError, "keep, reset or offload"),
        ({"always": ("nrm*",)}, SelectionError, 'always="nrm\\*" matches none of the 3 parameters'),
        ({"probabilities": dict.fromkeys(BLOCKS, 0.0)}, ConfigError, "every block has probability 0"),
        ({"probabilities": {BLOCKS[0]: 1.0}, "blocks": 2}, ConfigError, r"1 blocks can be drawn \(3 more have probability 0\)"),
        ({"probabilities": {"model.layers.9": 1.0}}, PlanError, 'no block of this name. Did you mean "model.layers.'),
        ({"draw": "independent", "always": (), "blocks": 1}, ConfigError, "may draw no block"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        LayerSampling(model_of_four(), **{"blocks": 1, **settings})


def test_models_with_nothing_to_train_are_refused():
    model = model_of_four()
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="none of its 4 blocks has a parameter that is trained"):
        LayerSampling(model)
    with pytest.raises(ModelError, match="no repeated blocks"):
        LayerSampling(torch.nn.Linear(3, 3))


def test_frozen_parameters_stay_frozen():
    model = model_of_four()
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
    sampling = LayerSampling(model, blocks=1, period=1)
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    train(model, sampling, optimizer, range(4))
    sampling.release()
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "mlp" in name)


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "cifar_resnet", "mixtral"])
def test_blocks_of_other_models_take_turns(name):
    model = MODELS[name]()
    sampling = LayerSampling(model, blocks=1, period=1, low_rank=LowRank(2))
    optimizer = adam(sampling)
    sampling.watch(optimizer)
    for step in range(4):
        sampling.at(step)
        inside = {
            id(one) for block in structure_of(model).blocks for one in model.get_submodule(block.name).parameters()
        }
        trained = {id(one) for one in model.parameters() if one.requires_grad}
        assert trained & inside == {id(one) for one in model.get_submodule(sampling.active[0]).parameters()}
