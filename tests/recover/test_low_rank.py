"""Low-rank Adam: steps worked by hand, ranks of what was learnt, moments that turn with their projector and stay float32."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from layerwise.errors import ConfigError, SolveError
from layerwise.recover import LowRank, LowRankAdam, Masks, parameter_groups
from layerwise.recover.low_rank import projector_of, turned
from layerwise.structure import structure_of
from models import small_llama


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projected(weight, rank, gap=0, scale=1.0, **more):
    return LowRankAdam([{"params": [weight], "rank": rank, "gap": gap, "scale": scale}], **more)


def step(optimizer, weight, gradient):
    weight.grad = torch.as_tensor(gradient, dtype=weight.dtype)
    optimizer.step()


def test_steps_worked_by_hand():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = projected(weight, 1, lr=0.1)
    step(optimizer, weight, [[3.0, 0], [4, 0], [0, 1]])
    assert torch.allclose(weight, torch.tensor([[-0.1, 0], [-0.1, 0], [0, 0]]), atol=2e-6)
    before = weight.detach().clone()
    step(optimizer, weight, [[0.0, 3], [0, 0], [0, 0]])  # at right angles to the projector, which stays
    assert torch.allclose(weight - before, torch.tensor([[-0.067005, 0], [-0.067005, 0], [0, 0]]), atol=2e-6)


def test_a_wide_step_worked_by_hand():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = projected(weight, 1, scale=0.25, lr=0.1)
    step(optimizer, weight, [[3.0, 4, 0], [0, 0, 1]])
    assert torch.allclose(weight, torch.tensor([[-0.025, -0.025, 0], [0, 0, 0]]), atol=2e-6)
    assert optimizer.state[weight]["mean"].shape == (1, 3)


@pytest.mark.parametrize(("rank", "norm"), [(1, 0.02449), (2, 0.03464), (4, 0.04899), (9, 0.04899)])
@pytest.mark.parametrize("turn", [False, True])
def test_the_first_step_has_a_known_size(rank, norm, turn):
    gradient = noise(6, 4)
    weight = torch.nn.Parameter(torch.zeros(4, 6) if turn else torch.zeros(6, 4))
    step(projected(weight, rank, lr=0.01), weight, gradient.T if turn else gradient)
    assert float(weight.detach().norm()) == pytest.approx(norm, abs=2e-5)
    assert norm == pytest.approx(0.01 * math.sqrt(6 * min(rank, 4)), abs=1e-5)


def test_what_is_learnt_has_the_rank_of_the_projectors():
    weight = torch.nn.Parameter(torch.zeros(16, 12, dtype=torch.float32))
    optimizer = projected(weight, 3, gap=5, lr=0.01)
    for number in range(10):
        step(optimizer, weight, noise(16, 12, seed=number))
        rank = int(torch.linalg.matrix_rank(weight.detach().double(), rtol=1e-5))
        assert rank == (3 if number < 5 else 6)


def test_a_group_without_a_rank_is_adam():
    """eps inside the corrected root is torch's place for it, so it must be small here."""
    weight, twin = (torch.nn.Parameter(noise(5, 3)) for _ in range(2))
    ours = LowRankAdam([weight], lr=0.01, eps=1e-12)
    torchs = torch.optim.Adam([twin], lr=0.01, eps=1e-12)
    for number in range(5):
        for optimizer, one in ((ours, weight), (torchs, twin)):
            step(optimizer, one, noise(5, 3, seed=number))
    assert torch.allclose(weight, twin, atol=1e-6)


def test_double_precision_stays_double():
    weight = torch.nn.Parameter(noise(6, 4).double())
    optimizer = projected(weight, 2, lr=0.1)
    step(optimizer, weight, noise(6, 4, seed=1))
    assert {value.dtype for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)} == {
        torch.float64
    }
    assert not torch.equal(weight.float().double(), weight)


def test_weights_decay_after_the_step_in_full_rank():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = projected(weight, 1, lr=0.1, weight_decay=0.5)
    step(optimizer, weight, [[3.0, 0], [4, 0], [0, 1]])
    assert torch.allclose(weight, 0.95 * torch.tensor([[0.9, 1], [0.9, 1], [1, 1]]), atol=2e-6)


def test_every_matrix_of_an_experts_tensor_has_its_own_projector():
    start, gradients = noise(3, 8, 6), [noise(3, 8, 6, seed=seed) for seed in (1, 2, 3)]
    whole = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(start[index].clone()) for index in range(3)]
    optimizer = projected(whole, 2, gap=2, lr=0.01)
    alone = [projected(part, 2, gap=2, lr=0.01) for part in parts]
    for gradient in gradients:
        step(optimizer, whole, gradient)
        for one, part, index in zip(alone, parts, range(3)):
            step(one, part, gradient[index])
    assert torch.allclose(whole, torch.stack(list(parts)), atol=1e-6)


def test_a_refresh_takes_the_gradient_that_comes_next():
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = projected(weight, 2)
    optimizer.refresh(weight)  # before any step: nothing to do
    step(optimizer, weight, noise(6, 4, seed=1))
    first = optimizer.state[weight]["projector"]
    step(optimizer, weight, noise(6, 4, seed=2))
    assert optimizer.state[weight]["projector"] is first
    optimizer.refresh(weight)
    step(optimizer, weight, noise(6, 4, seed=3))
    assert torch.equal(optimizer.state[weight]["projector"], projector_of(noise(6, 4, seed=3), 2))
    step(optimizer, weight, noise(6, 4, seed=4))
    assert torch.equal(optimizer.state[weight]["projector"], projector_of(noise(6, 4, seed=3), 2))


def test_nothing_starts_before_there_is_a_gradient():
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = projected(weight, 2)
    step(optimizer, weight, torch.zeros(6, 4))
    assert not optimizer.state[weight]
    step(optimizer, weight, noise(6, 4))
    assert torch.equal(optimizer.state[weight]["projector"], projector_of(noise(6, 4), 2))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_turned_moments_are_the_same_in_the_same_space(shape):
    """Another basis of the same space: the first moment is the same matrix, and turning back gives the numbers of before."""
    tall, side = shape[0] >= shape[1], min(shape)
    old = projector_of(noise(*shape, seed=1), side)
    new = projector_of(noise(*shape, seed=2), side)
    gradient = noise(*shape, seed=3)
    mean = gradient @ old.mT if tall else old.mT @ gradient
    there, square = turned(mean, mean.square(), old, new, tall=tall)
    assert torch.allclose(there @ new if tall else new @ there, gradient, atol=1e-5)
    assert square.sum().item() == pytest.approx(
        mean.square().sum().item(), rel=1e-4
    )  # the weights of each coordinate sum to 1
    back, _ = turned(there, square, new, old, tall=tall)
    assert torch.allclose(back, mean, atol=1e-5)


def test_a_turned_sign_is_no_change_and_a_new_direction_starts_with_the_mean():
    old = torch.eye(4)[:2]
    mean, square = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 9.0]])
    flipped = torch.tensor([[-1.0], [1.0]]) * old
    assert turned(mean, square, old, flipped, tall=True)[0].tolist() == [[-1.0, -2.0]]
    assert turned(mean, square, old, flipped, tall=True)[1].tolist() == [[1.0, 9.0]]
    there = turned(mean, square, old, torch.eye(4)[[0, 2]], tall=True)
    assert there[0].tolist() == [[1.0, 0.0]]
    assert there[1].tolist() == [[1.0, 5.0]]


def test_moments_are_kept_as_in_the_official_code_on_request():
    steps = {}
    for moments in ("turned", "kept"):
        weight = torch.nn.Parameter(torch.zeros(6, 4))
        optimizer = projected(weight, 4, gap=1, lr=0.1, moments=moments)
        step(optimizer, weight, noise(6, 4, seed=1))
        mean = optimizer.state[weight]["mean"].clone()
        old = optimizer.state[weight]["projector"]
        step(optimizer, weight, noise(6, 4, seed=2))
        new = optimizer.state[weight]["projector"]
        steps[moments] = optimizer.state[weight]["mean"]
        before = mean if moments == "kept" else mean @ (old @ new.mT)
        assert torch.allclose(steps[moments], 0.9 * before + 0.1 * (noise(6, 4, seed=2) @ new.mT), atol=1e-6)
    assert not torch.allclose(steps["kept"], steps["turned"], atol=1e-3)


def test_projectors_are_orthonormal_with_settled_signs():
    gradient = noise(3, 9, 5)
    rows = projector_of(gradient, 4)
    assert torch.allclose(rows @ rows.mT, torch.eye(4).expand(3, 4, 4), atol=1e-5)
    assert (rows.gather(-1, rows.abs().argmax(-1, keepdim=True)) > 0).all()
    assert torch.allclose(projector_of(-gradient, 4), rows, atol=1e-5)
    assert torch.allclose(projector_of(gradient.mT, 4), rows.mT, atol=1e-5)


def test_moments_of_half_precision_weights_are_float32_in_checkpoints_too():
    weight = torch.nn.Parameter(noise(6, 4).bfloat16())
    optimizer = projected(weight, 2, lr=0.1)
    step(optimizer, weight, noise(6, 4, seed=1))
    saved = copy.deepcopy(optimizer.state_dict())
    twin = torch.nn.Parameter(weight.detach().clone())
    other = projected(twin, 2, lr=0.1)
    other.load_state_dict(saved)
    for key in ("mean", "square", "projector"):
        assert other.state[twin][key].dtype == torch.float32
        assert torch.equal(other.state[twin][key], optimizer.state[weight][key])
    for number in (2, 3):
        for one, of in ((optimizer, weight), (other, twin)):
            step(one, of, noise(6, 4, seed=number))
    assert torch.equal(weight, twin)


def test_a_checkpoint_is_read_without_unpickling_objects(tmp_path):
    weight = torch.nn.Parameter(noise(6, 4))
    optimizer = projected(weight, 2, gap=3)
    step(optimizer, weight, noise(6, 4, seed=1))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert torch.equal(again["state"][0]["projector"], optimizer.state[weight]["projector"])


def test_state_takes_what_is_said():
    weight = torch.nn.Parameter(noise(24, 10))
    optimizer = projected(weight, 3)
    step(optimizer, weight, noise(24, 10, seed=1))
    held = sum(value.numel() * 4 for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert held == 4 * (2 * 3 * 24 + 3 * 10)


@pytest.mark.parametrize("contract", [False, True])
def test_projected_steps_leak_into_pruned_weights_unless_masks_are_held(contract):
    model = small_llama()
    structure = structure_of(model)
    keep = {layer.name: noise(*layer.shape, seed=index) > 0 for index, layer in enumerate(structure.layers)}
    masks = Masks(model, keep)
    optimizer = LowRankAdam(parameter_groups(model, 1e-2, low_rank=LowRank(4, gap=2)))
    if contract:
        masks.watch(optimizer)
    for number in range(4):
        ids = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(number))
        cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert all(not model.get_submodule(name).weight.grad[~mask].any() for name, mask in keep.items())
        optimizer.step()
        optimizer.zero_grad()
    assert (masks.leaked() == 0) == contract


def test_what_cannot_be_is_refused():
    weight = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ConfigError, match=r"shape \(4,\) is in a group with rank=2"):
        projected(weight, 2)
    for bad in ({"rank": 0}, {"gap": -1}, {"scale": 0.0}, {"scale": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            LowRank(**bad)
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"moments": "lost"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            LowRankAdam([weight], **bad)
    matrix = torch.nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(SolveError, match=r"a gradient of shape \(4, 3\) is not finite"):
        step(projected(matrix, 2), matrix, torch.full((4, 3), math.nan))
