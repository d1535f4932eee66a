"""The benchmark of the KV cache: what it counts, and the whole program on a toy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from layerwise.cache import QuantizedKVCache
from models import small_llama
from tiny import tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_bytes_are_those_of_the_tensors_each_once():
    from kv_measuring import decoding, held

    model = small_llama(num_hidden_layers=3)
    ids = torch.arange(3, 43).reshape(2, 20)
    found = decoding(model, ids, lambda: DynamicCache(config=model.config), new=4)
    assert (
        found["bytes"] == 3 * 2 * 2 * 2 * 20 * 8 * 4
    )  # layers, keys and values, batch, heads, tokens, channels, float32
    assert 0 < found["seconds"] < 10
    assert 0 < found["cpu_seconds"] < 10
    cache = QuantizedKVCache.uniform(4, 2, model.config, mode="kivi", group=4, residual=4)
    assert decoding(model, ids, lambda: cache, new=4)["bytes"] == cache.nbytes == held(cache)


class Inside(torch.Tensor):
    """As quanto's: a tensor that looks full size and holds codes."""


def test_codes_inside_a_tensor_of_another_class_are_what_counts():
    from kv_measuring import held

    layer = type("Layer", (), {})()
    layer.keys, layer.same = torch.zeros(4, 8).as_subclass(Inside), torch.zeros(3, 2)
    layer.keys.codes = torch.zeros(4, 2, dtype=torch.uint8)
    layer.again = layer.same.view(2, 3)
    assert held(type("Cache", (), {"layers": [layer]})()) == 8 + 24


def test_quality_of_the_plain_cache_is_perfect():
    from kv_measuring import quality

    model = small_llama(num_hidden_layers=3, initializer_range=0.3)
    windows = [torch.arange(3, 20), torch.arange(30, 41)]
    plain = quality(model, windows, lambda: DynamicCache(config=model.config), step=4)
    assert plain["kl"] == pytest.approx(0, abs=1e-7)
    cached = quality(model, windows, lambda: QuantizedKVCache.uniform(2, 2, model.config, residual=0), step=4)
    assert cached["kl"] > 1e-3
    assert cached["perplexity"] != plain["perplexity"]
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=window[None]).logits[0, :-1], window[1:], reduction="sum")
        for window in windows
    ]
    assert plain["perplexity"] == pytest.approx(torch.exp(sum(losses) / 26).item(), rel=1e-5)


@pytest.mark.slow
def test_the_whole_program_on_a_toy(tmp_path):
    tiny_llama(tmp_path / "model")
    command = [
        sys.executable, str(BENCHMARKS / "kv_cache.py"), "--models", "demo", "--demo", str(tmp_path / "model"), "--work", str(tmp_path),
        "--pairs", "K16V16,K4V2", "--tokens", "256", "--length", "64", "--step", "16", "--context", "40", "--new", "8", "--rounds", "2",
        "--threads", "1", "--out", str(tmp_path / "kv.md"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines() if row.startswith("| ")
    ]
    names = ["cache", "plain", "K16V16 per-token", "K4V2 per-token", "K16V16 kivi, group 16", "K4V2 kivi, group 16"]
    assert [row[0] for row in table] == names
    rows = {row[0]: row[1:] for row in table}
    # 3 layers, one head of 16: 96 numbers a token; two 16-bit numbers for 16 are 2 bits more
    assert rows["K4V2 per-token"][:3] == ["5.00", "60", f"{32 * 96 * 5 // 8 + 16 * 96 * 4:,}"]  # 16 of 48 wait
    assert rows["K4V2 kivi, group 16"][:2] == ["5.00", "60"]
    assert rows["K16V16 per-token"][:4] == ["16.00", "192", f"{48 * 96 * 4:,}", "0.0000"]
    assert rows["plain"][2] == f"{48 * 96 * 4:,}"
    lines = (tmp_path / "kv.jsonl").read_text().splitlines()
    assert len(lines) == 5 * 3  # quality and two rounds
    (tmp_path / "kv.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as if killed before the last
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "kv.jsonl").read_text().splitlines()[:-1] == lines[:-1]
    assert json.loads((tmp_path / "kv.jsonl").read_text().splitlines()[-1])["key"] == json.loads(lines[-1])["key"]


def test_throughput_runs_as_a_toy_and_refuses_full_size_without_cuda(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "kv_throughput_gpu.py")]
    small = ["--toy", "--caches", "plain,K4V4 per-token,K16V16 kivi", "--rounds", "1", "--context", "70", "--new", "4"]
    done = subprocess.run(
        [*command, *small, "--out", str(tmp_path / "kv.md")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {row["cache"]: row for row in map(json.loads, (tmp_path / "kv.jsonl").read_text().splitlines())}
    # 2 layers, keys and values, 2 sequences, 2 heads of 64: 64 of 74 tokens in 4 bits with two 16-bit numbers, 10 in bfloat16
    assert rows["K4V4 per-token"]["bytes"] == 2 * 2 * 2 * 2 * (64 * (32 + 4) + 10 * 128)
    assert rows["plain"]["bytes"] == rows["K16V16 kivi"]["bytes"] == 2 * 2 * 2 * 2 * 74 * 128
    assert rows["plain"]["change"] == rows["K16V16 kivi"]["change"] == 0 < rows["K4V4 per-token"]["change"] < 0.2
    if not torch.cuda.is_available():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert "--toy" in refused.stderr
