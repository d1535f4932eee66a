import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.allocate import erdos_renyi
from layerwise.errors import BudgetError, ConfigError

LENET = {"conv1": (6, 3, 5, 5), "conv2": (16, 6, 5, 5), "fc1": (120, 400), "fc2": (84, 120), "fc3": (10, 84)}


def resnet20():
    """CIFAR ResNet-20 with projection shortcuts: 270 896 weights."""
    shapes = {"conv": (16, 3, 3, 3)}
    width = 16
    for stage, wide in enumerate((16, 32, 64)):
        for block in range(3):
            shapes[f"{stage}.{block}.conv1"] = (wide, width, 3, 3)
            shapes[f"{stage}.{block}.conv2"] = (wide, wide, 3, 3)
            if width != wide:
                shapes[f"{stage}.{block}.shortcut"] = (wide, width, 1, 1)
            width = wide
    return shapes | {"fc": (10, 64)}


def resnet50():
    """(shapes, multiply-adds at 224): the stride is on the 3x3."""
    shapes, side = {"conv": (64, 3, 7, 7)}, {"conv": 112}
    width, size = 64, 56
    for stage, (wide, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3))):
        for block in range(blocks):
            name, before = f"{stage}.{block}", size
            if block == 0 and stage:
                size //= 2
            shapes[f"{name}.1"], side[f"{name}.1"] = (wide, width, 1, 1), before
            shapes[f"{name}.2"], side[f"{name}.2"] = (wide, wide, 3, 3), size
            shapes[f"{name}.3"], side[f"{name}.3"] = (4 * wide, wide, 1, 1), size
            if block == 0:
                shapes[f"{name}.shortcut"], side[f"{name}.shortcut"] = (4 * wide, width, 1, 1), size
            width = 4 * wide
    shapes["fc"], side["fc"] = (1000, 2048), 1
    return shapes, {name: math.prod(shape) * side[name] ** 2 for name, shape in shapes.items()}


def rounds(shapes, density, kernel):
    """The official loop, one layer (and its exact ties) made dense a round: the oracle. Returns densities and every eps."""
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    counted = {name: shape if kernel else shape[:2] for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in counted.items()}
    dense, seen = set(), []
    while rest := [name for name in shapes if name not in dense]:
        left = density * sum(size[n] for n in rest) - (1 - density) * sum(size[n] for n in dense)
        seen.append(left / sum(raw[n] * size[n] for n in rest))
        top = max(raw[n] for n in rest)
        if seen[-1] * top <= 1:
            break
        dense |= {n for n in rest if raw[n] == top}
    return {n: 1.0 if n in dense else seen[-1] * raw[n] for n in shapes}, seen


def kept(densities, shapes):
    return math.fsum(densities[name] * math.prod(shape) for name, shape in shapes.items())


def test_erk_on_lenet_worked_by_hand():
    got = erdos_renyi(LENET, 0.1)
    assert list(got.values()) == pytest.approx([0.300123, 0.094776, 0.077005, 0.143856, 0.795438], abs=1e-6)
    assert rounds(LENET, 0.1, True)[1] == pytest.approx([7.108170])
    assert kept(got, LENET) == pytest.approx(6177.0, rel=1e-12)


def test_er_on_lenet_worked_by_hand():
    got = erdos_renyi(LENET, 0.1, kernel=False)
    assert list(got.values()) == pytest.approx([1, 0.959384, 0.045353, 0.084725, 0.468478], abs=1e-6)
    eps = rounds(LENET, 0.1, False)[1]
    assert len(eps) == 2
    assert eps[-1] == pytest.approx(4.186404)
    assert kept(got, LENET) == pytest.approx(6177.0, rel=1e-12)
    assert erdos_renyi(LENET, 0.05, kernel=False)["conv1"] == pytest.approx(0.969397, abs=1e-6)


def test_erk_on_resnet20_worked_by_hand():
    shapes = resnet20()
    assert sum(map(math.prod, shapes.values())) == 270_896
    got = erdos_renyi(shapes, 0.1)
    assert rounds(shapes, 0.1, True)[1] == pytest.approx([16.407995, 16.772099, 16.985986])
    assert {name for name, density in got.items() if density == 1} == {"fc", "1.0.shortcut"}
    expected = {"conv": 0.982985, "0.0.conv1": 0.280151, "1.1.conv1": 0.129017, "2.1.conv1": 0.061744}
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert got["2.0.shortcut"] == pytest.approx(0.812806, abs=1e-6)
    assert rounds(shapes, 0.05, True)[1] == pytest.approx([8.203998])
    assert erdos_renyi(shapes, 0.05)["fc"] == pytest.approx(0.948587, abs=1e-6)


@pytest.mark.parametrize(("sparsity", "flops", "dense"), [(0.8, 0.4138, 8), (0.9, 0.2418, 1), (0.95, 0.1217, 0)])
def test_erk_on_resnet50_gives_the_published_flops(sparsity, flops, dense):
    shapes, macs = resnet50()
    assert sum(map(math.prod, shapes.values())) == 25_502_912
    assert sum(macs.values()) == pytest.approx(4.0892e9, rel=1e-4)
    got = erdos_renyi(shapes, 1 - sparsity)
    assert sum(got[name] * macs[name] for name in shapes) / sum(macs.values()) == pytest.approx(flops, abs=5e-5)
    assert sum(density == 1 for density in got.values()) == dense


@pytest.mark.parametrize(("sparsity", "body"), [(0.8, 0.13015), (0.9, 0.02142)])
def test_erk_plus_on_resnet50(sparsity, body):
    shapes, _ = resnet50()
    got = erdos_renyi(shapes, 1 - sparsity, dense=["fc"])
    rest = {name: shape for name, shape in shapes.items() if name != "fc"}
    assert got["fc"] == 1
    assert kept(got, rest) / sum(map(math.prod, rest.values())) == pytest.approx(body, abs=5e-6)
    assert {name: got[name] for name in rest} == pytest.approx(
        erdos_renyi(rest, kept(got, rest) / kept(dict.fromkeys(rest, 1), rest))
    )


def test_erk_plus_says_what_is_feasible():
    shapes, _ = resnet50()
    with pytest.raises(BudgetError) as caught:
        erdos_renyi(shapes, 0.05, dense=["fc"])
    assert str(caught.value) == (
        "1 of 54 layers stay dense and hold 8.03 % of the weights; the target keeps 5 %."
        " Lower the sparsity to 0.919, or keep fewer layers dense."
    )
    assert kept(erdos_renyi(shapes, 1 - 0.919, dense=["fc"]), shapes) == pytest.approx(25_502_912 * 0.081)
    with pytest.raises(ConfigError, match='"fcc" is to stay dense'):
        erdos_renyi(shapes, 0.5, dense=["fcc"])


def test_all_dense_and_a_density_of_one():
    assert erdos_renyi(LENET, 1.0) == pytest.approx(dict.fromkeys(LENET, 1.0))
    assert erdos_renyi(LENET, 1.0, dense=list(LENET)) == dict.fromkeys(LENET, 1.0)
    with pytest.raises(BudgetError, match="5 of 5 layers stay dense"):
        erdos_renyi(LENET, 0.9, dense=list(LENET))


def test_power_zero_is_uniform_and_experts_count_as_matrices():
    assert erdos_renyi(LENET, 0.3, power=0) == pytest.approx(dict.fromkeys(LENET, 0.3))
    shapes = {"experts": (8, 4), "q": (8, 4)}
    got = erdos_renyi(shapes, 0.25, sizes={"experts": 8 * 32, "q": 32})
    assert got == pytest.approx({"experts": 0.25, "q": 0.25})


def test_er_and_erk_agree_on_matrices():
    shapes = {"a": (4, 8), "b": (16, 8), "c": (2, 2)}
    assert erdos_renyi(shapes, 0.4) == erdos_renyi(shapes, 0.4, kernel=False)


some_shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=12,
).map(lambda shapes: {f"l{index}": shape for index, shape in enumerate(shapes)})


@settings(deadline=None)
@given(some_shapes, st.sampled_from([0.5, 0.1, 0.05, 0.01]), st.booleans())
def test_any_shapes_meet_the_budget_and_equal_the_official_rounds(shapes, density, kernel):
    got = erdos_renyi(shapes, density, kernel)
    budget = density * sum(map(math.prod, shapes.values()))
    assert all(0 < share <= 1 for share in got.values())
    assert abs(kept(got, shapes) - budget) < 1e-9 * budget
    assert got == pytest.approx(rounds(shapes, density, kernel)[0], rel=1e-9)


@settings(deadline=None)
@given(some_shapes, st.floats(0.2, 0.8), st.floats(0, 0.1), st.floats(0.9, 1))
def test_bounds_hold(shapes, density, low, high):
    got = erdos_renyi(shapes, density, low=low, high=high)
    assert all(low <= share <= high for share in got.values())
    assert kept(got, shapes) == pytest.approx(density * sum(map(math.prod, shapes.values())), rel=1e-9)


@settings(deadline=None)
@given(some_shapes, st.floats(0.05, 0.9), st.randoms())
def test_the_order_of_layers_does_not_matter(shapes, density, random):
    names = list(shapes)
    random.shuffle(names)
    assert erdos_renyi({name: shapes[name] for name in names}, density) == pytest.approx(
        erdos_renyi(shapes, density), rel=1e-12
    )
