from itertools import pairwise

import pytest
import torch

from farms_oracle import POOLED, WORKED, window_eigenvalues
from layerwise.errors import ScoreError, ShapeError
from layerwise.scores.spectra import Windows, blurred, slice_spectra, spectrum, window_spectrum
from layerwise.scores.tail_fit import fit_tail


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_windows_worked_by_hand():
    windows = Windows(rows=3, count=2)
    assert windows.shape(4, 6) == (3, 3)
    assert (windows.starts(4, 3), windows.starts(6, 3)) == ([0, 1], [0, 3])
    found = window_spectrum(WORKED, windows)
    assert found.tolist() == pytest.approx(POOLED, abs=2e-6)
    assert float(found.sum()) == pytest.approx(137)  # the squares of all four windows
    assert spectrum(WORKED).tolist() == pytest.approx([3.220688, 5.720318, 19.353983, 63.705011], abs=2e-6)


@pytest.mark.parametrize(
    ("shape", "steps", "numbers", "last"),
    [
        ((4096, 4096), (149, 149), (15, 15), (2086, 2086)),
        ((11008, 4096), (643, 149), (15, 15), (9002, 2086)),
        ((1024, 4096), (1, 219), (1, 15), (0, 3066)),
    ],
)
def test_layouts_of_real_shapes(shape, steps, numbers, last):
    windows = Windows()
    height, width = windows.shape(*shape)
    assert height == width == min(2000, *shape)
    starts = [windows.starts(length, height) for length in shape]
    assert tuple(map(len, starts)) == numbers
    assert tuple(one[-1] for one in starts) == last
    assert all(b - a == step for one, step in zip(starts, steps) for a, b in pairwise(one))


def test_a_sample_takes_the_middle_of_each_run():
    every = Windows().starts(4096, 2000)
    assert Windows(sample=3).starts(4096, 2000) == [every[i] for i in (2, 7, 12)]
    assert Windows(sample=5).starts(4096, 2000) == [every[i] for i in (1, 4, 7, 10, 13)]
    assert Windows(sample=1).starts(4096, 2000) == [every[7]]
    assert Windows(sample=99).starts(4096, 2000) == every
    assert Windows(sample=3).starts(576, 576) == [0]
    assert Windows(count=1).starts(10, 4) == [3]  # the official code divides by zero


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (41, 40), (200, 40)])
@pytest.mark.parametrize(("rows", "aspect"), [(16, 1.0), (16, 2.0), (24, 0.5), (2000, 1.0)])
@pytest.mark.parametrize("count", [4, 15])
def test_shared_gram_matrices_give_the_windows_own_singular_values(shape, rows, aspect, count):
    """Overlapping windows, where rows enter and leave the Gram matrix, and windows apart, where it is made anew."""
    weight = draw(*shape).double()
    want = window_eigenvalues(weight, rows, aspect, count)
    got = window_spectrum(weight, Windows(rows, aspect, count))
    assert len(got) == len(want)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-11 * float(want[-1]))
    half = len(want) // 2
    quick = window_spectrum(weight.float(), Windows(rows, aspect, count), torch.float32)
    assert torch.allclose(quick[half:].double(), want[half:], rtol=1e-4)


def test_float32_is_right_in_the_upper_half_and_float64_everywhere():
    weight = draw(128, 128)
    want = torch.linalg.svdvals(weight.double()).square().sort().values
    assert torch.allclose(spectrum(weight), want, rtol=1e-8)
    assert torch.allclose(spectrum(weight, torch.float32)[64:].double(), want[64:], rtol=1e-5)


def test_what_float32_cannot_resolve_is_known():
    weight = draw(256, 256)
    assert not blurred(spectrum(weight, torch.float32))
    weight[:128] = weight[128:]  # rank 128
    assert blurred(spectrum(weight, torch.float32))


def test_a_square_window_of_the_whole_is_the_whole():
    weight = draw(32, 32)
    assert torch.equal(window_spectrum(weight, Windows(rows=32)), spectrum(weight))


def test_transposed_and_scaled_windows_have_the_same_alpha():
    weight = draw(60, 100)
    for fit in ("mid", "peak"):
        alpha = fit_tail(window_spectrum(weight, Windows(24, count=4)), fit).alpha
        assert fit_tail(window_spectrum(0.01 * weight, Windows(24, count=4)), fit).alpha == pytest.approx(alpha)
        assert fit_tail(window_spectrum(weight.T, Windows(24, count=4)), fit).alpha == pytest.approx(alpha)


def whole_and_windows(weight):
    return [
        fit_tail(values, "mid").alpha for values in (spectrum(weight), window_spectrum(weight, Windows(128, count=4)))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_windows_take_the_shape_out_of_the_alpha_of_noise(seed):
    shapes = {
        (128, 128): (2.10, 2.18),
        (256, 128): (2.7, 2.8),
        (512, 128): (3.4, 3.6),
        (1024, 128): (4.4, 4.6),
        (512, 512): (2.1, 2.16),
    }
    found = {shape: whole_and_windows(draw(*shape, seed=seed)) for shape in shapes}
    whole, windowed = (dict(zip(found, column)) for column in zip(*found.values()))
    assert max(whole.values()) - min(whole.values()) > 2
    assert max(windowed.values()) - min(windowed.values()) < 0.15
    assert all(2.09 - 0.02 <= alpha <= 2.19 for alpha in windowed.values())
    for shape, (low, high) in shapes.items():
        assert low - 0.05 <= whole[shape] <= high + 0.05


def test_heavy_tails_stay_heavy_in_windows():
    student = draw(512, 128) / (draw(3, 512, 128, seed=1).square().mean(0)).sqrt()  # t, 3 degrees of freedom
    whole, windowed = whole_and_windows(student)
    assert 2.9 < whole < 3.3  # 8 draws: mean 3.13, deviation 0.10
    assert windowed == pytest.approx(2.04, abs=0.06)  # 2.04, 0.02


def test_a_convolution_is_a_slice_per_kernel_position():
    weight = draw(6, 4, 3, 3).double()
    slices = weight.permute(2, 3, 0, 1).flatten(0, 1)
    values = torch.stack([torch.linalg.svdvals(one).square() for one in slices])
    assert torch.allclose(slice_spectra(slices, None)[0], values.flatten().sort().values)
    (one,) = slice_spectra(slices, 1.0)  # one window of 4 x 4, two rows dropped
    want = torch.stack([torch.linalg.svdvals(one[:4]).square() for one in slices]).flatten().sort().values
    assert torch.allclose(one, want)
    flat = slice_spectra(slices.transpose(1, 2), 1.0)
    assert torch.allclose(flat[0], want)
    assert [len(part) for part in slice_spectra(draw(9, 13, 4).double(), 1.0)] == [36, 36, 36]
    assert [len(part) for part in slice_spectra(draw(9, 8, 4).double(), 0.5)] == [18, 18]  # 4 x 2
    assert [len(part) for part in slice_spectra(draw(9, 8, 4).double(), 2.0)] == [18] * 4  # 2 x 4


def test_refusals():
    with pytest.raises(ShapeError, match="no window of 100 rows and 2 times as many columns fits into 100 x 150"):
        window_spectrum(torch.ones(100, 150), Windows(100, aspect=2.0))
    with pytest.raises(ShapeError, match=r"aspect 0\.1"):
        slice_spectra(torch.ones(9, 8, 4), 0.1)
    for kernel in (spectrum, lambda weight: window_spectrum(weight, Windows())):
        with pytest.raises(ScoreError, match="not finite"):
            kernel(torch.tensor([[1.0, float("nan")], [0, 1]]))
