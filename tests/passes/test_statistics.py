import pytest
import torch

from layerwise.passes import Accumulator
from layerwise.passes.statistics import widest


@pytest.mark.parametrize("columns", [7, 512, 515])  # below, at and off the width from which strips are used
@pytest.mark.parametrize("sizes", [[3, 5], [600, 600, 1], [1500, 20]])
def test_second_moments_are_those_of_one_product_in_float64(columns, sizes):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, columns, generator=generator) for size in sizes]
    one = Accumulator(columns, "gram", torch.device("cpu"))
    for index, part in enumerate(parts):
        one.add(part)
        if index == 0:
            assert one.gram is not None  # reading in between changes nothing
    rows = torch.cat(parts).double()
    found = one.result()
    assert found.tokens == len(rows)
    assert torch.allclose(found.gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-2)
    assert torch.allclose(found.gram, found.gram.T, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.squares, found.gram.diagonal())


def test_rows_that_wait_are_copies():
    rows = torch.ones(2, 4)
    one = Accumulator(4, "gram", torch.device("cpu"))
    one.add(rows)
    rows.zero_()  # a model may write into its own activations
    assert float(one.gram.sum()) == 2 * 16


def test_long_sums_are_carried_in_float64_where_there_is_one():
    assert [widest(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [
        torch.float64,
        torch.float64,
        torch.float32,
    ]
    assert Accumulator(2, "squares", torch.device("cpu")).squares.dtype == torch.float64
