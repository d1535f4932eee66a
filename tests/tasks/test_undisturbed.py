import pytest
import torch
from torch import nn

from layerwise.tasks import left_alone, undisturbed


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[2].eval()
    return model


@pytest.mark.parametrize("context", [left_alone, undisturbed])
def test_modes_and_random_streams_are_what_they_were_also_after_an_error(context):
    model, state = network(), torch.get_rng_state()
    for fails in (False, True):
        try:
            with context([model]):
                assert not any(module.training for module in model.modules())
                torch.rand(3)
                assert not torch.equal(torch.get_rng_state(), state)
                if fails:
                    raise RuntimeError
        except RuntimeError:
            pass
        assert [module.training for module in model.modules()] == [True, True, True, False]
        assert torch.equal(torch.get_rng_state(), state)


def test_batch_norms_alone_may_normalise_by_the_batch():
    model = network()
    with left_alone([model], by_batch=True):
        assert [module.training for module in model.modules()] == [False, False, True, False]


@pytest.mark.parametrize("context", [left_alone, undisturbed])
def test_the_streams_of_cuda_are_put_back_where_it_is_in_use(context, monkeypatch):
    streams = [torch.tensor([1]), torch.tensor([2])]  # two devices
    for name, stand_in in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_rng_state_all": lambda: [one.clone() for one in streams],
        "set_rng_state_all": lambda states: streams.__setitem__(slice(None), states),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with context([network()]):
        streams[:] = [torch.tensor([3]), torch.tensor([4])]
    assert [int(one) for one in streams] == [1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("context", [left_alone, undisturbed])
def test_what_is_drawn_on_a_device_leaves_no_trace(context):
    torch.rand(1, device="cuda")
    state = torch.cuda.get_rng_state_all()
    with context([network()]):
        torch.rand(1, device="cuda")
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), state))
