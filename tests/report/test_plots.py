"""Pictures of plans: what stands where, which lines are one, and a real PNG for small and deep models and CNNs."""

import sys
from pathlib import Path

import pytest

from layerwise.errors import ConfigError, MissingExtra, OutputError
from layerwise.plan import Plan, Prune, Quantize
from layerwise.report import plot_bits, plot_sparsities
from layerwise.report.depth import by_depth, labels
from layerwise.structure.parts import Layer


def layer(name: str, role: str, block: str | None) -> Layer:
    return Layer(name, f"{name}.weight", "linear", role, (8, 4), 1, 8, 4, block=block)


def decoder(blocks: int) -> list[Layer]:
    return [
        layer(f"model.layers.{i}.{role}", role, f"model.layers.{i}") for i in range(blocks) for role in ("q", "k", "up")
    ]


CNN = [
    layer("conv1", "stem", None),
    *(layer(f"layer{s}.{b}.conv{c}", "conv", f"layer{s}.{b}") for s in (1, 2) for b in (0, 1) for c in (1, 2)),
    layer("linear", "head", None),
]


def plan(layers: list[Layer], sparsity) -> Plan:
    return Plan(layers={layer.name: Prune(sparsity=sparsity(layer)) for layer in layers})


def test_columns_and_lines_worked_by_hand():
    layers = decoder(2)
    depth = by_depth(
        plan(layers, lambda layer: {"q": 0.5, "k": 0.6, "up": 0.7}[layer.role] + 0.1 * int(layer.block[-1])), layers
    )
    assert depth.columns == ("0", "1")
    assert {name: [(c, round(s, 6)) for c, s in line] for name, line in depth.lines.items()} == {
        "q": [(0, 0.5), (1, 0.6)],
        "k": [(0, 0.6), (1, 0.7)],
        "up": [(0, 0.7), (1, 0.8)],
    }


def test_lines_on_top_of_each_other_are_one():
    """A difference of a few weights, from an exact budget, counts as none."""
    layers = decoder(3)
    by_shape = by_depth(plan(layers, lambda layer: {"q": 0.5, "k": 0.5004, "up": 0.7}[layer.role]), layers)
    assert list(by_shape.lines) == ["q, k", "up"]
    by_block = by_depth(plan(layers, lambda layer: 0.5 + 0.1 * int(layer.block[-1])), layers)
    assert by_block.lines == {"all layers": [(0, 0.5), (1, pytest.approx(0.6)), (2, pytest.approx(0.7))]}


def test_a_role_that_a_block_has_twice_goes_by_its_name():
    assert labels(CNN) == ["stem", *["conv1", "conv2"] * 4, "head"]
    assert by_depth(plan(CNN, lambda _: 0.5), CNN).columns == (
        "conv1",
        "layer1.0",
        "layer1.1",
        "layer2.0",
        "layer2.1",
        "linear",
    )


def test_layers_that_a_plan_leaves_alone_are_absent():
    layers = decoder(2)
    depth = by_depth(Plan(layers={layers[0].name: Prune(sparsity=0.5), layers[1].name: Quantize(bits=4)}), layers)
    assert depth.lines == {"q": [(0, 0.5)]}


@pytest.mark.parametrize("layers", [decoder(1), decoder(80), CNN], ids=["one block", "80 blocks", "cnn"])
def test_a_picture_is_written_whole(layers, tmp_path):
    plans = {
        "uniform": plan(layers, lambda _: 0.6),
        "other": plan(layers, lambda layer: 0.5 if layer.role == "q" else 0.7),
    }
    path = plot_sparsities(plans, layers, tmp_path / "deep/plan.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert [file.name for file in path.parent.iterdir()] == ["plan.png"]
    plot_sparsities(plans, layers, path)  # a picture of a new run replaces the old one


def test_it_opens_no_window_and_touches_no_global_state(tmp_path):
    plot_sparsities({"a": plan(CNN, lambda _: 0.5)}, CNN, tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="none of them prunes"):
        plot_sparsities({"a": Plan(layers={})}, CNN, tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        plot_sparsities({"a": plan(CNN, lambda _: 0.5)}, CNN, tmp_path / "file/a.png")

    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] == "matplotlib":
                raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtra, match=r"pip install 'layerwise\[report\]'"):
        plot_sparsities({"a": plan(CNN, lambda _: 0.5)}, CNN, Path(tmp_path / "a.png"))


def test_bits_by_depth_and_their_picture(tmp_path):
    layers = decoder(3)
    made = Plan(
        layers={
            layer.name: Quantize(bits=8 if layer.role == "q" else 2 + int(layer.block[-1]), group=4) for layer in layers
        }
    )
    assert by_depth(made, layers, "bits").lines == {
        "q": [(0, 8.0), (1, 8.0), (2, 8.0)],
        "k, up": [(0, 2.0), (1, 3.0), (2, 4.0)],
    }
    assert by_depth(made, layers).lines == {}
    assert plot_bits({"mixed": made}, layers, tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ConfigError, match="none of them quantises"):
        plot_bits({"a": plan(layers, lambda _: 0.5)}, layers, tmp_path / "a.png")
