"""The lowest of many tensors together, against putting them together and sorting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.solvers import pooled
from layerwise.solvers.pooled import keep_lowest_out_of_all

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EDGES = [0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 5e-324, 1e-40, -1e-40, 1.0000001, -1.0000001, 65504.0, 1e300]


def by_sorting(scores, pruned, least=None, most=None):
    """The definition: all in one row, its bounded ends at -inf and inf, and a stable sort in which of equal ones the last goes first."""
    rows = []
    for index, score in enumerate(scores):
        row = score.double().flatten().clone()
        order = lowest_first(row)
        rows.append(row)
        if least is not None:
            row[order[: least[index]]] = -math.inf
            row[order[most[index] :]] = math.inf
    keep = torch.ones(sum(map(len, rows)), dtype=torch.bool)
    keep[lowest_first(torch.cat(rows))[:pruned]] = False
    return [k.view(s.shape) for k, s in zip(keep.split([len(r) for r in rows]), scores, strict=True)]


def lowest_first(row):
    return len(row) - 1 - row.flip(0).sort(stable=True).indices


numbers = st.one_of(st.sampled_from(EDGES), st.integers(-2, 2).map(float), st.floats(allow_nan=False))
tensors = st.builds(
    lambda values, dtype: torch.tensor(values, dtype=torch.float64).to(dtype),
    st.lists(numbers, max_size=12),
    st.sampled_from(DTYPES),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(tensors, min_size=1, max_size=4), st.data())
def test_the_masks_are_those_of_sorting_all_together(scores, data):
    sizes = [score.numel() for score in scores]
    pruned = data.draw(st.integers(0, sum(sizes)))
    bounds = {}
    if data.draw(st.booleans()):
        ends = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in sizes]
        bounds = {"least": [low for low, _ in ends], "most": [high for _, high in ends]}
    chunk = data.draw(st.sampled_from([1, 2, 5, 1 << 19]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled, "CHUNK", chunk)
        patch.setattr(
            pooled, "DIGIT", data.draw(st.sampled_from([8, 8, 8, 16]))
        )  # of 16, counting takes most of the time
        got = keep_lowest_out_of_all(scores, pruned, **bounds)
    assert sum(int((~mask).sum()) for mask in got) == pruned
    for mask, expected in zip(got, by_sorting(scores, pruned, **bounds), strict=True):
        assert torch.equal(mask, expected)


def test_ties_of_several_tensors_keep_the_first_also_for_zeros_of_both_signs():
    scores = [
        torch.tensor([-0.0, 1.0]),
        torch.tensor([[0.0], [-1.0], [0.0]]),
        torch.tensor([-0.0], dtype=torch.float16),
    ]
    got = keep_lowest_out_of_all(scores, 3)
    assert [mask.flatten().tolist() for mask in got] == [[True, True], [True, False, False], [False]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_numbers_in_any_memory_layout(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(300, 70, generator=generator).to(dtype).T,
        torch.randn(5, 4, 3, generator=generator).to(dtype),
    ]
    scores.append(torch.randn(2, 3, 4, 4, generator=generator).to(dtype).to(memory_format=torch.channels_last))
    for pruned in (1, 10_000, 21_155):
        got = keep_lowest_out_of_all(scores, pruned)
        assert all(torch.equal(*pair) for pair in zip(got, by_sorting(scores, pruned), strict=True))


@pytest.mark.parametrize("bounded", [False, True])
def test_what_it_holds_does_not_grow_with_the_scores(bounded, monkeypatch):
    """Nothing as large as one of the scores is made, but the masks: every other number is counted within a chunk."""
    scores, made = [torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)], []
    monkeypatch.setattr(pooled, "CHUNK", 128)
    theirs = {score.untyped_storage().data_ptr() for score in scores}

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in theirs:
                made.append((result.numel(), result.dtype))
            return result

    bounds = {"least": [100, 0, 7], "most": [4000, 4096, 3000]} if bounded else {}
    with Sizes():
        keep_lowest_out_of_all(scores, 9000, **bounds)
    large = [one for one in made if one[0] > 128]
    assert {(4096, torch.bool), (1 << 16, torch.int64)} >= set(large)
    assert large.count((4096, torch.bool)) >= 3  # and views of them
