"""Pictures of spectra: densities that add up, a law of the right height, and a PNG for small and deep models and CNNs."""

import math

import pytest
import torch

from layerwise.errors import ConfigError, OutputError
from layerwise.report import plot_spectra, view_of
from layerwise.report.spectra import BINS, DECADES, _spread
from layerwise.scores import LayerTail, Look, fit_tail, layer_tails
from layerwise.structure import structure_of
from layerwise.structure.parts import Layer
from models import MODELS


def layer(name="a", block=None, role="q"):
    return Layer(name, f"{name}.weight", "linear", role, (8, 4), 1, 8, 4, block=block)


def tail_of(*spectra, fit="mid"):
    fits = tuple(fit_tail(values, fit) for values in spectra)
    return LayerTail("a", sum(one.alpha for one in fits) / len(fits), "", spectra, fits)


def test_a_density_is_of_all_eigenvalues_though_the_small_ones_are_not_shown():
    values = torch.logspace(-8, 2, 1001, dtype=torch.float64)  # a hundred a decade
    view = view_of(layer(), tail_of(values))
    assert (view.low, view.high) == (pytest.approx(2 - DECADES), pytest.approx(2))
    assert len(view.density) == BINS
    assert all(density == pytest.approx(0.1, rel=0.15) for density in view.density)  # a tenth of them in each
    assert sum(view.density) * DECADES / BINS == pytest.approx(0.35, abs=0.005)


def test_the_law_that_is_drawn_holds_as_many_eigenvalues_as_the_tail():
    values = (1 - torch.linspace(0, 1, 5001, dtype=torch.float64)[:-1]).pow(-1 / 1.5)  # density exponent 2.5
    view = view_of(layer(), tail_of(values))
    start = view.share * (view.alpha - 1) * math.log(10)  # as `_panel` draws it, per decade
    integral = start / ((view.alpha - 1) * math.log(10))
    assert view.share == integral == 0.5
    bin_of_cut = int((math.log10(view.cut) - view.low) / (view.high - view.low) * BINS) + 1
    middle = 10 ** (view.low + (bin_of_cut + 0.5) * (view.high - view.low) / BINS)
    assert view.density[bin_of_cut] == pytest.approx(start * (middle / view.cut) ** (1 - view.alpha), rel=0.05)


def test_several_spectra_are_one_histogram():
    one, two = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)).double().sort().values
    view = view_of(layer(), tail_of(one, two))
    assert view.share == 0.5
    assert view.alpha == (fit_tail(one, "mid").alpha + fit_tail(two, "mid").alpha) / 2
    empty = view_of(layer(), LayerTail("a", None, "no alpha"))
    assert (empty.density, empty.alpha) == ((), None)
    zeros = view_of(layer(), LayerTail("a", None, "no alpha", (torch.zeros(9),)))
    assert zeros.density == ()


def test_blocks_are_chosen_from_the_first_to_the_last():
    assert _spread([str(n) for n in range(30)], 6) == ["0", "6", "12", "17", "23", "29"]
    assert _spread(["a", "b"], 6) == ["a", "b"]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.read_bytes().endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(("name", "include"), [("llama", []), ("cifar_resnet", ["*"]), ("t5", [])])
def test_a_picture_of_a_model(name, include, tmp_path):
    model = MODELS[name]()
    structure = structure_of(model, include=include)
    with torch.no_grad():
        model.get_parameter(structure.layers[1].parameter).zero_()  # a panel without a spectrum
    tails = layer_tails(model, structure, Look(None, "mid"), spectra=True)
    views = [view_of(structure.layer(tail.name), tail) for tail in tails]
    assert is_png(plot_spectra(views, tmp_path / "new/spectra.png", title=name))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["spectra.png"]


def test_a_picture_of_many_blocks_and_roles(tmp_path):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double().sort().values
    views = [
        view_of(layer(f"layers.{block}.r{role}", f"layers.{block}", f"r{role}"), tail_of(values))
        for block in range(40)
        for role in range(9)
    ]
    assert is_png(plot_spectra(views, tmp_path / "deep.png"))


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="none of the layers has a spectrum"):
        plot_spectra([view_of(layer(), LayerTail("a", 2.0))], tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        plot_spectra([view_of(layer(), tail_of(torch.arange(1.0, 9)))], tmp_path / "file/a.png")
