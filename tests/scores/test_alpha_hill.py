import errno
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from farms_oracle import window_eigenvalues
from layerwise.errors import ScoreError
from layerwise.io import load, load_streamed
from layerwise.scores import SCORES, alpha_hill, alphas_kept, fit_tail, layer_tails, spectrum, watched
from layerwise.scores.alpha_cache import fingerprint_of
from layerwise.scores.alpha_hill import Look, layer_spectra, layer_tail
from layerwise.scores.spectra import Windows
from layerwise.structure import as_matrices, parameter_of, structure_of
from models import MODELS, small_llama
from tiny import tiny_llama

WHOLE = Look(None, "mid")


def zero_out(model, structure, *names):
    with torch.no_grad():
        for name in names:
            parameter_of(model, structure.layer(name)).zero_()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "t5", "vit"])
@pytest.mark.parametrize("windows", [None, Windows(12, count=4)])
def test_every_kind_of_layer_gets_the_alpha_of_its_matrices(name, windows):
    model = MODELS[name]()
    structure = structure_of(model)
    found = alpha_hill(model, structure, Look(windows, "mid"))
    assert list(found) == [layer.name for layer in structure.layers]
    for layer in structure:
        parts = []
        for matrix in as_matrices(parameter_of(model, layer).detach(), layer):
            whole = torch.linalg.svdvals(matrix.float()).square()
            parts.append(whole if windows is None else window_eigenvalues(matrix.float(), 12, 1.0, 4))
        assert found[layer.name] == pytest.approx(fit_tail(torch.cat(parts).sort().values, "mid").alpha, rel=1e-3)


def test_a_convolution_is_cut_across_its_channels_and_its_alphas_are_averaged():
    model = MODELS["cifar_resnet"]()
    layer = structure_of(model).layer("layer3.0.conv1")  # 32 outputs, 16 inputs, 3 x 3
    weight = parameter_of(model, layer).detach()
    slices = weight.double().permute(2, 3, 0, 1).flatten(0, 1)
    halves = [
        torch.stack([torch.linalg.svdvals(one).square() for one in slices[:, first : first + 16]])
        .flatten()
        .sort()
        .values
        for first in (0, 16)
    ]
    tail = layer_tail(weight, layer, Look(Windows(), "mid"))
    assert [len(values) for values in tail.spectra] == [144, 144]
    assert tail.alpha == pytest.approx(sum(fit_tail(half, "mid").alpha for half in halves) / 2, rel=1e-3)
    whole = layer_tail(weight, layer, WHOLE)
    pooled = torch.stack([torch.linalg.svdvals(one).square() for one in slices]).flatten().sort().values
    assert whole.alpha == pytest.approx(fit_tail(pooled, "mid").alpha, rel=1e-3)


def test_a_convolution_in_groups_pools_their_slices():
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 24, 3, groups=2))
    (layer,) = structure_of(model, include=["*"])
    (values,), note = layer_spectra(model[0].weight.detach().double(), layer, None)
    want = [
        torch.linalg.svdvals(model[0].weight[12 * group : 12 * group + 12, :, y, x].double()).square()
        for group in (0, 1) for y in range(3) for x in range(3)
    ]  # fmt: skip
    assert torch.allclose(values, torch.cat(want).sort().values)
    assert note == ""


def test_what_is_too_small_for_the_windows_is_taken_whole_and_says_so():
    model = MODELS["llama"]()
    structure = structure_of(model)  # hidden 32, k and v of 16 outputs
    tails = {
        tail.name.rpartition(".")[2]: tail for tail in layer_tails(model, structure, Look(Windows(20, 1.5, 3), "mid"))
    }
    assert tails["k_proj"].note == ""  # windows of 16 x 24
    tails = {
        tail.name.rpartition(".")[2]: tail for tail in layer_tails(model, structure, Look(Windows(30, 2.0, 3), "mid"))
    }
    assert tails["q_proj"].note == "too small for windows of aspect 2: its whole matrix was used"
    weight = parameter_of(model, structure.layers[0]).detach()
    assert layer_tail(weight, structure.layers[0], Look(Windows(30, 2.0), "mid")).alpha == pytest.approx(
        fit_tail(spectrum(weight), "mid").alpha, rel=1e-5
    )
    conv = MODELS["cifar_resnet"]()
    layer = structure_of(conv).layers[0]  # 8 x 8 slices
    tail = layer_tail(parameter_of(conv, layer).detach(), layer, Look(Windows(aspect=0.1), "mid"))
    assert tail.note.startswith("too small for windows of aspect 0.1")
    assert len(tail.spectra) == 1


def test_layers_without_a_tail_are_left_out_and_say_why():
    model = MODELS["llama"]()
    structure = structure_of(model)
    names = [layer.name for layer in structure][:3]
    zero_out(model, structure, names[0])
    with torch.no_grad():
        parameter_of(model, structure.layer(names[1])).fill_(0.3)  # rank one
        parameter_of(model, structure.layer(names[2]))[0, 0] = 1.0
    for fit in ("mid", "peak", "full"):
        for windows in (None, Windows()):
            found = alpha_hill(model, structure, Look(windows, fit))
            assert names[0] not in found
            assert names[1] not in found
            assert names[2] in found
            assert all(math.isfinite(alpha) and alpha > 1 for alpha in found.values())
    notes = {tail.name: tail.note for tail in layer_tails(model, structure, WHOLE)}
    assert notes[names[0]] == "no alpha: a tail needs two eigenvalues that are not zero, and there are 0"
    assert "there are 1" in notes[names[1]]
    few = {tail.note for tail in layer_tails(model, structure, Look(None, "mid", fewest=50)) if tail.alpha is None}
    assert "no alpha: 16 eigenvalues, fewer than 50" in few


def test_half_of_a_matrix_without_rank_is_seen_through():
    """Float32 would take the rounding of zeros for eigenvalues, and half of them for the upper half."""
    model = MODELS["llama"]()
    layer = structure_of(model).layers[0]
    weight = parameter_of(model, layer).detach().clone()
    weight[20:] = weight[:12]
    values = torch.linalg.svdvals(weight.double()).square().sort().values
    assert layer_tail(weight, layer, WHOLE).alpha == pytest.approx(fit_tail(values[12:], "mid").alpha, rel=1e-6)


def test_a_weight_that_is_not_finite_is_named():
    model = MODELS["llama"]()
    structure = structure_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(ScoreError, match=r'layer "model\.layers\.1\.mlp\.up_proj": spectrum: a weight is not finite'):
        alpha_hill(model, structure)


def test_it_tells_how_far_it_is():
    model = MODELS["llama"]()
    structure, told = structure_of(model), []
    with watched(lambda *now: told.append(now)):
        SCORES["alpha-hill"](model, None, structure)
    assert told[0] == (0, 14, "model.layers.0.self_attn.q_proj")
    assert told[-1] == (14, 14, "")
    alpha_hill(model, structure)
    assert len(told) == 15  # nobody listens any more


def test_a_streamed_model_has_the_same_alphas_and_none_of_its_weights_in_memory(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    model, streamed = load(folder), load_streamed(folder)
    structure = structure_of(streamed)
    for tail in layer_tails(streamed, structure):
        assert all(parameter_of(streamed, layer).is_meta for layer in structure), tail.name
    assert alpha_hill(streamed, structure) == alpha_hill(model, structure_of(model))


@pytest.fixture
def no_spectrum(monkeypatch):
    """From here on nothing can be computed anew."""

    def off():
        def refuse(*args):
            raise AssertionError("computed again")

        monkeypatch.setattr(sys.modules["layerwise.scores.alpha_hill"], "layer_tail", refuse)

    return off


def test_what_was_computed_is_kept_until_a_weight_changes(tmp_path, no_spectrum):
    model = MODELS["llama"]()
    structure = structure_of(model)
    zero_out(model, structure, structure.layers[0].name)
    first = list(layer_tails(model, structure, cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 14
    no_spectrum()
    again = list(layer_tails(model, structure, cache=tmp_path))
    assert [(tail.name, tail.alpha, tail.note) for tail in again] == [
        (tail.name, tail.alpha, tail.note) for tail in first
    ]
    with alphas_kept(tmp_path):
        assert len(alpha_hill(model, structure)) == 13
    with pytest.raises(AssertionError, match="computed again"):
        alpha_hill(model, structure)  # outside, nothing is kept
    for other in (WHOLE, Look(Windows(rows=31)), Look(Windows(sample=2))):
        with pytest.raises(AssertionError, match="computed again"):
            alpha_hill(model, structure, other, cache=tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] += 1e-7
    seen = layer_tails(model, structure, cache=tmp_path)
    assert [next(seen).name for _ in range(12)][-1] == "model.layers.1.mlp.gate_proj"
    with pytest.raises(AssertionError, match="computed again"):
        next(seen)


def test_two_layers_with_the_same_bytes_in_another_shape_are_not_mixed_up(tmp_path):
    models = [torch.nn.Sequential(torch.nn.Linear(*shape, bias=False)) for shape in ((32, 16), (16, 32))]
    with torch.no_grad():
        models[1][0].weight.copy_(models[0][0].weight.reshape(32, 16))
    first, second = (alpha_hill(one, structure_of(one, include=["*"]), WHOLE, tmp_path) for one in models)
    assert first != second


def test_damage_is_computed_again_and_a_folder_that_cannot_be_written_is_said(tmp_path):
    model = MODELS["llama"]()
    structure = structure_of(model)
    want = alpha_hill(model, structure, cache=tmp_path / "kept")
    for file, text in zip(
        sorted((tmp_path / "kept").iterdir()), ["", "[1]", '{"alpha": "x"}', '{"alpha": NaN, "note": ""}']
    ):
        file.write_text(text)
    assert alpha_hill(model, structure, cache=tmp_path / "kept") == want
    assert all(json.loads(file.read_text())["note"] == "" for file in (tmp_path / "kept").iterdir())
    (tmp_path / "file").write_text("")
    tails = list(layer_tails(model, structure, cache=tmp_path / "file"))
    assert {tail.name: tail.alpha for tail in tails} == want
    assert "alphas could not be kept in " in tails[0].note
    assert not any(tail.note for tail in tails[1:])  # once is enough


def test_a_disk_that_fills_up_is_left_without_half_a_file(tmp_path, monkeypatch):
    def full(file, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    model = MODELS["llama"]()
    tails = list(layer_tails(model, structure_of(model), cache=tmp_path))
    assert tails[0].note.endswith("No space left on device")
    assert not list(tmp_path.iterdir())


def test_another_torch_or_device_computes_anew(monkeypatch):
    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="cuda")

    weight = torch.ones(2, 2)
    first = fingerprint_of(weight, {"look": "x"})
    assert fingerprint_of(weight.clone(), {"look": "x"}) == first
    assert fingerprint_of(weight.as_subclass(Elsewhere), {"look": "x"}) != first
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert fingerprint_of(weight, {"look": "x"}) != first


def test_bfloat16_weights_are_read_as_they_are(tmp_path):
    model = small_llama(0, dtype=torch.bfloat16)
    structure = structure_of(model)
    found = alpha_hill(model, structure, WHOLE, tmp_path)
    assert found == alpha_hill(model.float(), structure, WHOLE)


def test_the_model_is_untouched():
    model = MODELS["llama"]().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    alpha_hill(model, structure_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
