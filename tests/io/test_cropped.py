"""Networks of other widths come back from their folders as they were, built by the constructor that made them."""

import json
from importlib.util import find_spec

import pytest
import torch

from cnns import CNNS, IMAGE, Toy, filled
from layerwise.errors import MissingExtra, ModelError, OutputError, PlanError
from layerwise.io import export_onnx, load_cropped, save_cropped
from layerwise.methods import PreConfig, PreCrop
from layerwise.plan import Plan, Resize
from layerwise.shrink import crop, shrink_channels
from layerwise.structure import cnn_channels

X = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(2))


def cropped(name="toy", method=None):
    model = CNNS[name]()
    plan = (method or PreCrop(parameters=0.7, macs=None, image_size="3x8x8")).plan(model)
    crop(model, plan)
    return filled(model), plan


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy-norms", "option-a", "linear-excite", "densenet", "shuffle", "flat", "unet"])
def test_saved_and_loaded_it_gives_the_same(name, tmp_path):
    model, plan = cropped(name)
    folder = save_cropped(model, tmp_path / "out", plan)
    again = load_cropped(CNNS[name](), folder)
    assert torch.equal(again(X), model(X))
    assert not again.training
    assert Plan.load(folder / "plan.yaml") == plan
    assert sorted(path.name for path in folder.iterdir()) == ["layerwise.json", "model.safetensors", "plan.yaml"]


@torch.no_grad()
def test_wider_ones_and_trained_ones_that_were_cut(tmp_path):
    model, plan = cropped("toy", PreConfig(image_size="3x8x8"))
    assert any(entry.resize.channels > 32 or name == "stem" for name, entry in plan.layers.items())
    assert torch.equal(load_cropped(Toy(), save_cropped(model, tmp_path / "wide", plan))(X), model(X))
    model = filled(Toy())
    keep = {"b1c1": [0, 3, 9], "proj": list(range(2, 30))}
    shrink_channels(model, keep, cnn_channels(model, IMAGE))
    plan = Plan(method={"image_size": "3x8x8"}, layers={name: Resize(channels=len(u)) for name, u in keep.items()})
    assert torch.equal(load_cropped(Toy(), save_cropped(model, tmp_path / "cut", plan))(X), model(X))


def test_a_network_that_has_not_the_plan_s_widths_is_not_written(tmp_path):
    _, plan = cropped()
    for other, words in ((Toy(), r'"\w+" has \d+ channels'), (CNNS["flat"](), "has no channels")):
        with pytest.raises(ModelError, match=rf"{words} that can change, \d+ in the plan: crop"):
            save_cropped(other, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit(tmp_path):
    model, plan = cropped()
    folder = save_cropped(model, tmp_path / "out", plan)
    with pytest.raises(OutputError, match="exists already"):
        save_cropped(model, folder, plan)
    save_cropped(model, folder, plan, force=True)
    with pytest.raises(PlanError, match="no layer that first writes"):
        load_cropped(CNNS["flat"](), folder)
    with pytest.raises(PlanError, match="image_size"):
        save_cropped(model, tmp_path / "other", Plan(layers={}))
    record = json.loads((folder / "layerwise.json").read_text())
    record["channels"]["widths"]["b1c1"] = 1
    (folder / "layerwise.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="Build the model as it was saved"):
        load_cropped(Toy(), folder)
    (folder / "layerwise.json").write_text("{}")
    with pytest.raises(ModelError, match="does not say the widths"):
        load_cropped(Toy(), folder)


@pytest.mark.skipif(find_spec("onnx") is not None, reason="onnx is there")
def test_onnx_says_what_it_needs(tmp_path):
    model, plan = cropped()
    with pytest.raises(MissingExtra, match="pip install onnx"):
        export_onnx(model, tmp_path / "model.onnx", plan)
    assert not (tmp_path / "model.onnx").exists()


def test_onnx_gives_the_same(tmp_path):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model, plan = cropped("toy-norms")
    path = export_onnx(model, tmp_path / "model.onnx", plan)
    (found,) = reference.ReferenceEvaluator(str(path)).run(None, {"x": X.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(X), atol=1e-4)
