"""Folders of factors: bytes, exact loading, the product for other tools, and files that contradict each other."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from factors import drawn
from layerwise.engine import Settings, compress
from layerwise.errors import ModelError
from layerwise.io import (
    ArmorLinear,
    armor_linears,
    load,
    load_into,
    load_streamed,
    multiplied_out,
    save,
    save_whole_streamed,
    saved_report,
)
from layerwise.io.armor_linear import factored
from layerwise.io.factored_read import factored_folder
from layerwise.io.verify import Verified
from layerwise.methods import Armor
from layerwise.solvers import ARMOR
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for
from quantized import quantized
from tiny import tiny_llama

torch.set_num_threads(1)
IDS = torch.arange(24).view(1, 24)
BATCHES = Batches(tuple({"input_ids": (IDS * 7 + seed) % 60} for seed in range(3)), {})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the dense model, the model with its products in it, factors, the folder saved)."""
    root = tmp_path_factory.mktemp("factored")
    source = tiny_llama(root / "model")
    model = load(source, dtype="bfloat16")
    plan = Armor(block=8, overhead=1.0).plan(model)
    result = compress(model, plan, solver=ARMOR(iterations=3), data=BATCHES)
    saved = save(model, root / "out", plan=plan, factors=result.factors, dense=source)
    return source, model, result, saved


def copied(made, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in made[3].folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_folder_loads_to_the_same_factors_and_logits(made):
    _, model, result, saved = made
    loaded = load(saved.folder)
    found = armor_linears(loaded)
    assert set(found) == set(result.factors)
    for name, module in found.items():
        assert torch.equal(module.factors.weight(), result.factors[name].weight())
    # another order of sums in bfloat16 than the product has
    torch.testing.assert_close(
        logits(loaded).float(), logits(model).float(), atol=0.05 * float(logits(model).abs().max()), rtol=0
    )
    assert saved.verified.loader == "layerwise.load"
    assert saved.verified.difference == 0
    assert "Loads with layerwise.load" in saved.lines()[-1]


def test_bytes_are_those_that_were_counted(made):
    _, model, result, saved = made
    stored = load_file(saved.folder / "factored.safetensors")
    size = sum(
        t.numel() * t.element_size()
        for name, t in stored.items()
        if name.rpartition(".")[2] in ("left", "values", "bits", "right")
    )
    assert size == saved.report.factored.bytes == sum(one.stored_bits for one in result.factors.values()) / 8
    assert saved.report.factored.bits == pytest.approx(result.bits)
    header = (saved.folder / "factored.safetensors").stat().st_size - sum(
        t.numel() * t.element_size() for t in stored.values()
    )
    everything = sum(p.numel() for p in model.parameters()) * result.model_bits / 8
    assert saved.report.bytes - header == pytest.approx(everything)
    record = json.loads((saved.folder / "layerwise.json").read_text())
    assert record["loader"] == "layerwise.load"
    assert record["saved"]["factored"]["layers"] == len(result.factors)
    assert "bits per weight of these" in (saved.folder / "README.md").read_text()


def test_dense_multiplies_out_to_a_stock_folder(made, tmp_path):
    _, model, _, saved = made
    dense = load(saved.folder, dense=True)
    assert not armor_linears(dense)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
    other = save(dense, tmp_path / "dense")
    assert other.verified.loader == "transformers.AutoModelForCausalLM"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert torch.equal(logits(stock), logits(model))
    again = multiplied_out(load(saved.folder))
    assert torch.equal(logits(again), logits(dense))


def test_a_stock_loader_finds_no_weights_instead_of_inventing_some(made):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(made[3].folder)


def test_a_loaded_model_can_be_saved_again_and_in_other_dtypes(made, tmp_path):
    loaded = load(made[3].folder)
    save(loaded, tmp_path / "again", verify=False)
    first, second = (load_file(one / "factored.safetensors") for one in (made[3].folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))
    wide = load(made[3].folder, dtype="float32")
    assert {module.values.dtype for module in armor_linears(wide).values()} == {torch.float32}
    torch.testing.assert_close(
        logits(wide), logits(load(made[3].folder, dense=True, dtype="float32")), atol=1e-4, rtol=1e-3
    )


def test_streamed_models_are_saved_in_factors_and_such_folders_are_streamed(made, tmp_path):
    source, _, _, saved = made
    streamed = load_streamed(source, dtype=torch.bfloat16)
    plan = Armor(block=8, overhead=1.0).plan(load(source, dtype="bfloat16"))
    own = compress(
        streamed, plan, solver=ARMOR(iterations=3), data=BATCHES, settings=Settings(work=str(tmp_path / "work"))
    )
    folder = save_whole_streamed(streamed, tmp_path / "out", dense=source, factors=own.factors).folder
    assert len(list(folder.glob("factored-*.safetensors"))) > 1
    assert not list(folder.glob("model*.safetensors"))
    assert torch.equal(logits(load(folder)), logits(load(saved.folder)))
    back = load_streamed(folder)  # its blocks come multiplied out
    report = save_whole_streamed(back, tmp_path / "dense", dense=folder).report
    assert report.factored is None
    assert torch.equal(logits(load(tmp_path / "dense")), logits(load(saved.folder, dense=True)))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.two(self.one(x).relu())


def test_a_module_of_ones_own_class_is_filled_in_factors(tmp_path):
    model, x = Own(), torch.randn(3, 8)
    factors = {"two": drawn(8, 16, 4)}
    model.two.weight.data = factors["two"].weight()
    save(model, tmp_path / "own", factors=factors)
    loaded = load_into(Own(), tmp_path / "own")
    assert isinstance(loaded.two, ArmorLinear)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=1e-4)


def test_layers_that_the_format_cannot_hold_stay_dense_with_a_note(made, tmp_path):
    source, _, _, _ = made
    model = load(source)
    saved = save(model, tmp_path / "out", factors={"model.norm": drawn(8, 8, 4)}, verify=False)
    assert saved.report.notes == ('model.norm saved dense: "model.norm" is a LlamaRMSNorm; factors are for linears.',)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_stale_factors_and_codes_beside_them_are_refused(made, tmp_path):
    source, _, result, _ = made
    name = next(iter(result.factors))
    changed = load(source)
    with pytest.raises(ModelError, match="its weight is not what its factors give"):
        save(changed, tmp_path / "out", factors=result.factors)
    assert not (tmp_path / "out").exists()
    codes = quantized(changed, lambda layer, index: (4, None, True) if layer == name else None)
    with pytest.raises(ModelError, match="codes or factors, not both"):
        save(changed, tmp_path / "out", factors=result.factors, codes=codes)


def streamed_whole(folder):
    model = load_streamed(folder)
    for block in model.layerwise_store.names:
        model.layerwise_store.bring(block)


def test_files_that_contradict_the_record_are_one_line(made, tmp_path):
    folder = copied(made, tmp_path)
    tensors = load_file(folder / "factored.safetensors")
    layer = next(name for name in tensors if name.endswith(".values")).removesuffix(".values")
    record = json.loads((folder / "layerwise.json").read_text())

    def spoilt(entry=None, **parts):
        (folder / "layerwise.json").write_text(json.dumps(record | ({"factors": entry} if entry is not None else {})))
        new = tensors | {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        new = {name: tensor for name, tensor in new.items() if tensor is not None}
        save_file(new, folder / "factored.safetensors", metadata={"format": "pt"})
        (folder / "factored.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(new, "factored.safetensors")})
        )
        said = set()
        for read in (load, streamed_whole):
            with pytest.raises(ModelError) as caught:
                read(folder)
            said.add(str(caught.value))
        (text,) = said
        assert "\n" not in text
        return text

    assert f'"{layer}.values" is missing' in spoilt(values=None)
    assert "values and bits are" in spoilt(values=tensors[f"{layer}.values"][:, 1:].contiguous())
    assert "marks" in spoilt(bits=torch.zeros_like(tensors[f"{layer}.bits"]))
    assert "is I32 of shape" in spoilt(values=tensors[f"{layer}.values"].int())
    assert "is F32 of shape" in spoilt(bits=tensors[f"{layer}.bits"].float())
    assert "differ in dtype (BF16, F32)" in spoilt(left=tensors[f"{layer}.left"].float())
    assert "factors have 3 dimensions" in spoilt(left=tensors[f"{layer}.left"].flatten())
    bits = tensors[f"{layer}.bits"].clone()
    bits[0, 0] = 0b00010111  # as many as 2:4 has in these eight
    assert "other than 2 entries as kept in 2 groups of 4" in spoilt(bits=bits)
    for pattern in ("2:0", "0:4", "-2:-4", "5:4", "2:4:8"):
        assert "cannot be read" in spoilt(entry={"format": 1, "layers": {layer: pattern}})
    assert "other than 1 entries" in spoilt(entry={"format": 1, "layers": record["factors"]["layers"] | {layer: "1:2"}})
    assert '"model.absent.left" is missing' in spoilt(entry={"format": 1, "layers": {"model.absent": "2:4"}})
    with pytest.raises(ModelError, match="is missing"):
        saved_report(folder)
    assert "format 2; this layerwise reads 1" in spoilt(entry={"format": 2, "layers": {}})
    assert "cannot be read" in spoilt(entry={"format": 1, "layers": {layer: "two:four"}})
    assert factored_folder(made[0]) is None


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(folder of the dense GPT-2, the model with its products in it, factors, the folder saved); c_proj of the attention is square."""
    root = tmp_path_factory.mktemp("gpt2")
    model = MODELS["gpt2"]().eval()
    model.save_pretrained(root / "model")
    result = compress(model, Armor(block=8, overhead=1.0).plan(model), solver=ARMOR(iterations=2), data=BATCHES)
    assert len(result.factors) == 8
    return root / "model", model, result, save(model, root / "out", factors=result.factors)


def test_conv1d_loads_in_factors_and_dense_the_right_way_round(gpt2, tmp_path):
    _, model, result, saved = gpt2
    record = json.loads((saved.folder / "layerwise.json").read_text())
    assert set(record["factors"]["turned"]) == set(result.factors)
    loaded, dense = load(saved.folder), load(saved.folder, dense=True)
    assert set(armor_linears(loaded)) == set(result.factors)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
    save(loaded, tmp_path / "again", verify=False)
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))
    plain = multiplied_out(loaded)
    assert all(type(plain.get_submodule(name)).__name__ == "Conv1D" for name in result.factors)
    assert torch.equal(logits(plain), logits(dense))
    saved = save(plain, tmp_path / "plain")
    assert saved.verified.loader == "transformers.AutoModelForCausalLM"


def test_conv1d_is_streamed_in_and_out_of_factors(gpt2, tmp_path):
    source, model, result, saved = gpt2
    save_whole_streamed(load_streamed(saved.folder), tmp_path / "dense", dense=saved.folder)
    assert torch.equal(logits(load(tmp_path / "dense")), logits(model))
    streamed = load_streamed(tmp_path / "dense")
    save_whole_streamed(streamed, tmp_path / "out", dense=source, factors=result.factors)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(saved.folder)))


@pytest.mark.parametrize("turned", [[], ["lm_head"], [1], 1])
def test_a_record_that_turns_layers_wrongly_is_one_line(gpt2, tmp_path, turned):
    folder = copied(gpt2, tmp_path)
    record = json.loads((folder / "layerwise.json").read_text())
    square = "transformer.h.0.attn.c_proj"
    entry = {"format": 1, "layers": record["factors"]["layers"], "turned": turned}
    entry["turned"] = turned or [layer for layer in record["factors"]["turned"] if layer != square]
    (folder / "layerwise.json").write_text(json.dumps({"factors": entry}))
    for read in (load, lambda folder: load(folder, dense=True), load_streamed):
        with pytest.raises(
            ModelError, match="cannot be read" if turned else f'"{square}" that its weight is not turned'
        ):
            read(folder)


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """(folder of a dense ViT, whose files name weights otherwise than the model, the model with products, factors, the folder saved)."""
    root = tmp_path_factory.mktemp("vit")
    model = MODELS["vit"]().eval()
    model.save_pretrained(root / "model")
    batches = Batches((inputs_for("vit", model),), {})
    result = compress(model, Armor(block=8, overhead=1.0).plan(model), solver=ARMOR(iterations=2), data=batches)
    return root / "model", model, result, save(model, root / "out", factors=result.factors)


def test_a_model_whose_files_have_other_names_is_saved_in_factors(renamed, tmp_path):
    _, model, result, saved = renamed
    inputs = inputs_for("vit", model)
    loaded, dense = load(saved.folder), load(saved.folder, dense=True)
    assert set(armor_linears(loaded)) == set(result.factors)
    assert saved.report.notes == ()
    assert saved.verified.loader == "layerwise.load"
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
    save(loaded, tmp_path / "again", verify=False)
    again = load(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())
    stock = save(dense, tmp_path / "dense")
    assert stock.verified.loader.startswith("transformers.")


def test_files_that_name_no_layer_as_the_model_are_left_alone(renamed, tmp_path, monkeypatch):
    _, model, result, _ = renamed
    monkeypatch.setattr(sys.modules["layerwise.io.save"], "write_own_names", lambda model, folder: None)
    stored = save(model, tmp_path / "out", factors=result.factors)
    assert stored.verified.loader.startswith("transformers.")
    assert stored.report.factored is None
    assert "saved dense: the files of this architecture" in stored.report.notes[0]
    assert (tmp_path / "out/model.safetensors").is_file()
    record = json.loads((tmp_path / "out/layerwise.json").read_text())
    assert "factors" not in record
    assert record["loader"].startswith("transformers.")
    assert not armor_linears(load(tmp_path / "out"))
    run = copy.deepcopy(model)
    factored(run, result.factors)
    with pytest.raises(ModelError, match=r"cannot be saved in factors.*multiplied_out"):
        save(run, tmp_path / "other")
    monkeypatch.undo()
    save(run, tmp_path / "other", verify=False)
    assert set(armor_linears(load(tmp_path / "other"))) == set(result.factors)


def test_a_streamed_model_without_a_layer_in_factors_is_a_stock_folder(made, tmp_path):
    source = made[0]
    factors = {"model.norm": drawn(8, 8, 4)}
    saved = save_whole_streamed(load_streamed(source), tmp_path / "out", dense=source, factors=factors)
    assert "factors are for linears" in saved.report.notes[0]
    assert saved.report.factored is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/layerwise.json").read_text())["loader"] == "transformers.AutoModelForCausalLM"


def test_the_folder_checked_is_the_folder_delivered(made, tmp_path, monkeypatch):
    _, model, result, _ = made
    seen = {}

    def look(model, folder, loader, **_):
        seen.update({file.name: file.read_bytes() for file in folder.iterdir()})
        return Verified("layerwise.load", 1, (), None)

    monkeypatch.setattr(sys.modules["layerwise.io.verify"], "verify", look)
    folder = save(model, tmp_path / "out", factors=result.factors).folder
    delivered = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert seen.keys() == delivered.keys()
    first, last = (json.loads(files.pop("layerwise.json")) for files in (seen, delivered))
    assert first | {"verified": last["verified"]} == last
    assert {name for name in seen if seen[name] != delivered[name]} == {"README.md"}
