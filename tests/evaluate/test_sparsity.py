import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from layerwise.errors import ModelError, SelectionError
from layerwise.evaluate import count_zeros
from layerwise.io import zeros


@pytest.fixture
def folder(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    weight[1] = -0.0
    save_file({"a.weight": weight, "norm.weight": torch.tensor([0.0, 1.0])}, tmp_path / "model-1.safetensors")
    save_file(
        {
            "b.weight": torch.eye(4).bfloat16(),
            "packed": torch.zeros(5, 5, dtype=torch.int32),
            "scale": torch.tensor(0.0),
        },
        tmp_path / "model-2.safetensors",
    )
    files = {"a.weight": 1, "norm.weight": 1, "b.weight": 2, "packed": 2, "scale": 2}
    index = {"weight_map": {name: f"model-{file}.safetensors" for name, file in files.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_saved_zeros_over_all_files(folder):
    got = count_zeros(folder)
    assert got.zeros == {"a.weight": 5, "norm.weight": 1, "b.weight": 12, "scale": 1}  # packed integers are codes
    assert got.per_layer == {"a.weight": 5 / 12, "b.weight": 0.75}
    assert got.total == 19 / 31
    assert got.bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert got.to_dict()["total"] == got.total
    assert count_zeros(folder / "model-2.safetensors").zeros == {"b.weight": 12, "scale": 1}


def test_pieces_of_rows_change_nothing(folder, monkeypatch):
    whole = count_zeros(folder)
    monkeypatch.setattr(zeros, "ROWS", 5)
    assert count_zeros(folder) == whole


def test_named_layers_only(folder):
    assert count_zeros(folder, ["b.weight"]).total == 0.75
    for absent in ("c.weight", "packed"):
        with pytest.raises(SelectionError, match=f"{absent}: no such floating-point tensor"):
            count_zeros(folder, ["b.weight", absent])


def test_in_memory_counts_tied_weights_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[:, :3] = 0
    got = count_zeros(model)
    assert got.zeros == {"0.weight": 12}
    assert got.bytes == 64


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_float8(tmp_path):
    save_file({"w": torch.tensor([[0.0, 1.0], [-0.0, 2.0]]).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert count_zeros(tmp_path).zeros == {"w": 2}


def test_a_file_that_is_no_part_of_the_model_is_not_counted(folder):
    whole = count_zeros(folder)
    save_file({"lora.weight": torch.zeros(8, 8)}, folder / "adapter.safetensors")
    assert count_zeros(folder) == whole


def test_folders_without_readable_weights(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        count_zeros(tmp_path / "absent")
    with pytest.raises(ModelError, match="no weights in it"):
        count_zeros(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="truncated or not safetensors"):
        count_zeros(tmp_path)
