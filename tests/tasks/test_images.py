import pickle

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.errors import ConfigError, DataError
from layerwise.tasks import Batches, call, images


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, shade in (("b/0.png", 0), ("a/1.png", 255), ("a/0.png", 51)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.fromarray(np.full((4, 6, 3), shade, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_of_classes(folder):
    (batch,) = images(folder)
    assert batch["pixel_values"].shape == (3, 3, 4, 6)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == pytest.approx([0.2, 1.0, 0.0])
    assert batch["labels"].tolist() == [0, 0, 1]
    assert "labels" not in images(folder / "a")[0]


def test_folder_refuses_sizes_that_differ_and_broken_files(folder):
    image = pytest.importorskip("PIL.Image")
    image.new("L", (9, 9)).save(folder / "b" / "big.png")
    with pytest.raises(DataError, match="different sizes"):
        images(folder)
    (folder / "b" / "big.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"big\.png: cannot be read as an image"):
        images(folder)


def test_image_processor_resizes_and_normalises(folder):
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    batches = images(folder, processor=processor)
    assert batches[0]["pixel_values"].shape == (3, 3, 8, 8)
    assert batches[0]["pixel_values"][:, 0, 0, 0].tolist() == pytest.approx([-0.6, 1.0, -1.0], abs=0.01)
    assert "ViTImageProcessorPil" in batches.protocol["normalised"]


def test_npz_with_mean_and_std(tmp_path):
    pixels = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.arange(5, dtype=np.uint8))
    batches = images(tmp_path / "d.npz", mean=[0.1, 0.2, 0.3], std=[0.5, 0.4, 0.2], batch=2)
    assert [len(one["labels"]) for one in batches] == [2, 2, 1]
    expected = (
        torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    ) / torch.tensor([0.5, 0.4, 0.2])[:, None, None]
    assert torch.allclose(torch.cat([one["pixel_values"] for one in batches]), expected)


def test_npz_samples_keep_their_labels(tmp_path):
    pixels = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.arange(10))
    (batch,) = images(tmp_path / "d.npz", samples=6, seed=1)
    assert batch["pixel_values"].shape == (6, 1, 2, 2)
    assert torch.equal((batch["pixel_values"][:, 0, 0, 0] * 255).round().long(), batch["labels"])
    assert len(batch["labels"].unique()) == 6


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros(3)}, "no array `images`"),
        ({"images": np.zeros((2, 2, 2))}, "float64"),
        ({"images": np.zeros((2, 2, 2), np.uint8), "labels": np.zeros(3, int)}, "one integer for each of 2 images"),
        ({"images": np.array([{}], dtype=object)}, "without pickle"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, says):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=says):
        images(tmp_path / "d.npz")


def test_a_damaged_npz_is_one_line(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", images=np.arange(4096, dtype=np.uint8).reshape(16, 16, 16))
    damaged = bytearray((tmp_path / "d.npz").read_bytes())
    damaged[60:75] = b"\xff" * 15  # in the compressed stream
    (tmp_path / "d.npz").write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read"):
        images(tmp_path / "d.npz")


def test_npz_never_unpickles(tmp_path):
    (tmp_path / "d.npz").write_bytes(pickle.dumps({"images": 1}))
    with pytest.raises(DataError, match="cannot be read"):
        images(tmp_path / "d.npz")


def test_digits_splits_share_nothing():
    pytest.importorskip("sklearn")
    calibration, held_out = images("digits"), images("digits", split="held-out")
    assert calibration.protocol["samples"] + held_out.protocol["samples"] == 1797
    assert held_out.protocol["samples"] == 360
    assert calibration[0]["pixel_values"].shape == (32, 1, 8, 8)
    assert 0 <= calibration[0]["pixel_values"].min() <= calibration[0]["pixel_values"].max() <= 1


def test_settings_out_of_range(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(DataError, match="2 images cannot give 3 samples"):
        images(tmp_path / "d.npz", samples=3)
    with pytest.raises(ConfigError):
        images(tmp_path / "d.npz", mean=[0.5])
    with pytest.raises(ConfigError, match="give numbers above 0"):
        images(tmp_path / "d.npz", mean=[0.5], std=[0.0])
    with pytest.raises(ConfigError, match="1 channels"):
        images(tmp_path / "d.npz", mean=[0.5] * 3, std=[1] * 3)
    with pytest.raises(DataError, match="no such data"):
        images(tmp_path / "none.npz")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_plain_modules_get_the_pixels_as_first_argument():
    batches = Batches(({"pixel_values": torch.ones(2, 1, 2, 2), "labels": torch.tensor([0, 1])},), {})
    model = Plain()
    assert torch.equal(call(model, batches[0]), model(torch.ones(2, 1, 2, 2)))
    with pytest.raises(TypeError):  # two tensors that forward does not know: nothing is guessed
        call(model, {"a": torch.ones(1), "b": torch.ones(1)})


def test_hash_follows_values_names_and_shapes():
    one = Batches(({"x": torch.arange(4.0)},), {})
    assert one.hash == Batches(({"x": torch.arange(4.0)},), {"source": "other"}).hash
    others = (
        {"y": torch.arange(4.0)},
        {"x": torch.arange(4.0)[None]},
        {"x": torch.arange(4)},
        {"x": torch.arange(1.0, 5)},
    )
    assert len({one.hash, *(Batches((other,), {}).hash for other in others)}) == 5
