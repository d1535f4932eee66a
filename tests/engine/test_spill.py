"""Waiting activations: estimated before they are made, and kept in files where that is asked for, with the same result to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerwise.engine import PassesWaiting, Settings, compress, walk
from layerwise.errors import ConfigError, OutputError, SaveError, SolveError
from layerwise.passes import PausedPasses, Waiting, collect_dense, spill, spilling, waiting
from layerwise.plan import Plan, Prune
from layerwise.solvers import SparseGPT, Wanda
from layerwise.structure import parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, TOKENS, inputs_for


@pytest.fixture
def mapped(monkeypatch):
    """Tensors of any size go to files; yields how large each file was."""
    sizes = []
    from_file = torch.from_file

    def counted(path, **kwargs):
        sizes.append(Path(path).stat().st_size)
        return from_file(path, **kwargs)

    monkeypatch.setattr(spill, "LEAST", 1)
    monkeypatch.setattr(torch, "from_file", counted)
    return sizes


def setup(name):
    model = MODELS[name]()
    structure = structure_of(model)
    plan = Plan(layers={layer.name: Prune(sparsity=0.5) for layer in structure.layers})
    return model, structure, plan, Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(3)), {})


def weights(model, structure):
    return {layer.name: parameter_of(model, layer).detach().clone() for layer in structure.layers}


@pytest.mark.parametrize("propagate", ["compressed", "dense"])
@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "llava", "dit"])
def test_in_files_the_result_is_the_same_to_the_bit(name, propagate, mapped, tmp_path):
    model, structure, plan, data = setup(name)
    plain = compress(model, plan, solver=SparseGPT(), data=data, settings=Settings(propagate))
    assert not mapped
    spilled, *_ = setup(name)
    where = {key: value.data_ptr() for key, value in data[0].items()}
    settings = Settings(propagate, spill=str(tmp_path / "a" / "b"))
    result = compress(spilled, plan, solver=SparseGPT(), data=data, settings=settings)
    assert len(mapped) >= 3 * len(structure.blocks)  # what stands before each
    assert result.layers == plain.layers
    expected = weights(model, structure)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(spilled, structure).items())
    assert list(tmp_path.iterdir()) == []
    assert {key: value.data_ptr() for key, value in data[0].items()} == where  # the user's data is left alone
    assert not hasattr(spilled, "layerwise_spill")


def test_what_scores_collect_can_wait_in_files_too(mapped, tmp_path):
    model, structure, _, data = setup("llama")
    plain = [found for _, found in collect_dense(model, structure, data)]
    with spilling(model, tmp_path):
        spilled = [found for _, found in collect_dense(model, structure, data)]
        assert mapped
    for a, b in zip(plain, spilled, strict=True):
        assert all(torch.equal(a[name][0].squares, b[name][0].squares) for name in a)
    assert list(tmp_path.iterdir()) == []


def test_files_are_gone_after_an_error_and_after_a_walk_that_was_left(mapped, tmp_path):
    model, _, plan, data = setup("llama")
    kept = tmp_path / "mine.txt"
    kept.write_text("stays")
    settings = Settings(spill=str(tmp_path))
    events = walk(model, plan, Wanda(), data, settings=settings)
    for _ in range(4):
        next(events)
    assert len(list(tmp_path.iterdir())) == 2
    assert not [
        file for folder in tmp_path.iterdir() if folder.is_dir() for file in folder.iterdir()
    ]  # mapped, no names
    events.close()
    assert list(tmp_path.iterdir()) == [kept]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SolveError):
        compress(model, plan, solver=Wanda(), data=data, settings=settings)
    assert list(tmp_path.iterdir()) == [kept]
    assert not hasattr(model, "layerwise_spill")


def test_parameters_buffers_and_calibration_data_stay_where_they_are(mapped, tmp_path):
    one = spill.Spill(tmp_path, 1)
    parameter, buffer, odd = torch.nn.Parameter(torch.ones(9)), torch.ones(9), torch.ones(3).expand(3, 3)
    one.leave([buffer])
    one.keep({"a": [parameter, buffer, odd, torch.ones(0)]})
    assert not mapped
    activations = [torch.arange(6).to(dtype) for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.int64)]
    activations.append(torch.arange(24.0).view(2, 3, 4).transpose(1, 2))
    before = [tensor.clone() for tensor in activations]
    strides = [tensor.stride() for tensor in activations]
    one.keep(activations)
    one.keep(activations)  # in files already
    assert mapped == [6, 12, 12, 48, 96]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(activations, before, strict=True))
    assert [tensor.stride() for tensor in activations] == strides
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_and_a_full_disk_are_one_line(tmp_path, monkeypatch, mapped):
    model, _, plan, data = setup("llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"spill folder .* cannot be made"):
        compress(model, plan, solver=Wanda(), data=data, settings=Settings(spill=str(tmp_path / "file" / "x")))

    def full(path, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    with pytest.raises(SaveError, match=r"cannot put \d+ bytes .* No space left on device\. Give a folder"):
        compress(model, plan, solver=Wanda(), data=data, settings=Settings(spill=str(tmp_path / "full")))
    assert not (tmp_path / "full").exists()


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from layerwise.engine import Settings, walk
from layerwise.plan import Plan, Prune
from layerwise.solvers import Wanda
from layerwise.tasks.batches import Batches

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(32, 32)
    def forward(self, x):
        return x + self.lin(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
    def forward(self, x):
        x = x * 1
        for block in self.blocks:
            x = block(x)
        return x

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

data = Batches(tuple({"x": torch.ones(1, 32768, 32)} for _ in range(12)), {})  # 4 MiB each
plan = Plan(layers={f"blocks.{i}.lin": Prune(sparsity=0.5) for i in range(3)})
for spill in (sys.argv[1], None):
    before = anonymous()
    events = walk(Model(), plan, Wanda(), data, settings=Settings(spill=spill))
    print(max(anonymous() for _ in events) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is told by Linux")
def test_memory_of_the_process_falls(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    spilled, plain = map(int, run.stdout.split())
    activations = 12 * 32768 * 32 * 4
    assert plain > 1.8 * activations  # inputs and outputs of a block
    assert spilled < 0.5 * activations


def test_the_estimate_comes_first_and_is_what_waits():
    model, _, plan, data = setup("llama")
    events = walk(model, plan, Wanda(), data)
    first = next(events)
    events.close()
    assert isinstance(first, PassesWaiting)
    hidden, rotary, ids = 2 * TOKENS * 32 * 4, TOKENS * 8 * 4, TOKENS * 8
    with PausedPasses(model, ["model.layers.0"], data[:1]) as passes:
        arguments = passes.first().arguments
    names = {key: value for key, value in arguments[1].items() if value is not None}
    assert set(names) >= {"position_embeddings"}
    # three hidden states, cosine and sine, positions; three batches of one size
    assert 3 * (3 * hidden + 2 * rotary) <= first.waiting.bytes <= 3 * (3 * hidden + 2 * rotary + 3 * ids)
    assert first.waiting.longest == TOKENS
    assert first.waiting.place == "cpu"
    result = compress(model, plan, solver=Wanda(), data=data)
    assert result.waiting.bytes == first.waiting.bytes
    assert result.to_dict()["waiting"]["longest"] == TOKENS


def test_batches_of_several_lengths_are_weighed_by_their_tokens():
    model = MODELS["llama"]()
    short, long = (torch.ones(1, tokens, dtype=torch.int64) for tokens in (4, 20))
    found = []
    for batches in ([short], [short, long]):
        with PausedPasses(model, ["model.layers.0"], [{"input_ids": ids} for ids in batches]) as passes:
            found.append(waiting.waiting_of(passes))
            assert len(passes.passes) == 1  # the others have not started
    assert found[1].bytes == 6 * found[0].bytes
    assert [one.longest for one in found] == [4, 20]


def test_what_does_not_fit_is_known():
    assert Waiting(10, None, "cpu", None).fits
    assert Waiting(10, None, "cpu", 10).fits
    assert not Waiting(11, None, "cpu", 10).fits


def test_a_container_has_less_than_the_machine(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    monkeypatch.setattr(waiting, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(waiting, "_GROUP", tmp_path)
    cpu = torch.device("cpu")
    assert waiting.available_memory(cpu) == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert waiting.available_memory(cpu) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert waiting.available_memory(cpu) == 4096


def test_passes_that_wait_on_an_accelerator_cannot_be_spilled(tmp_path):
    model = MODELS["timm_vit"]().to("meta")
    batch = {"pixel_values": torch.ones(1, 3, 16, 16, device="meta")}
    with (
        spilling(model, tmp_path),
        PausedPasses(model, ["blocks.0"], [batch]) as passes,
        pytest.raises(ConfigError, match="spill: activations wait on meta"),
    ):
        waiting.waiting_of(passes)
