"""Latency and memory."""

import functools
import time

import pytest
import torch
from torch import nn

from layerwise.errors import ConfigError, ModelError
from layerwise.evaluate import latency, memory, peak_memory
from models import MODELS, small_llama


@pytest.fixture(scope="module")
def model():
    return small_llama()


def test_latency_reports_median_spread_and_how(model):
    threads = torch.get_num_threads()
    got = latency(model.train(), prompt=32, context=8, new=4, threads=1, seconds=0.05)
    assert model.training
    assert torch.get_num_threads() == threads
    assert got.prefill_ms > 0
    assert got.decode_ms > 0
    assert got.prefill_iqr >= 0
    assert got.prefill_runs >= 1
    expected = {"threads": 1, "prompt": 32, "context": 8, "new": 4, "batch": 1, "dtype": "float32", "compiled": False}
    assert expected.items() <= got.protocol.items()
    assert "cpu" in got.to_dict()["protocol"]["device"]


class Slow(nn.Module):
    """Takes 2 ms for each token it is given; checks that decoding goes on from the cache it was handed."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 1)
        self.seen = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        past_key_values = [0] if past_key_values is None else past_key_values
        past_key_values[0] += input_ids.shape[1]
        self.seen.append(past_key_values[0])
        time.sleep(0.002 * input_ids.shape[1])
        return type("Output", (), {"past_key_values": past_key_values})()


def test_latency_measures_what_it_says():
    model = Slow()
    got = latency(model, prompt=10, context=5, new=3, threads=1, seconds=0.1)
    # a sleep is never shorter than asked for, and on a busy machine it may be much longer
    assert 20 <= got.prefill_ms < 200
    assert 2 <= got.decode_ms < got.prefill_ms
    slow = latency(model, prompt=10, context=5, new=3, threads=1, seconds=0.001)
    assert slow.prefill_runs >= 3  # not the one run that fills the time: its spread would be 0
    assert model.seen[-3:] == [6, 7, 8]  # every run starts behind the same context


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_kv_bytes_worked_by_hand(dtype, bytes_each):
    model = small_llama(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32).to(dtype)
    got = latency(model, prompt=20, context=8, new=2, threads=1, seconds=0.01)
    # keys and values of 3 layers, 2 heads of 8, 20 tokens: not of the 4 query heads, and not of the decoding
    assert got.kv_bytes == 2 * 3 * 2 * 8 * 20 * bytes_each
    assert got.protocol["prompt"] == 20


def test_a_sliding_window_keeps_less():
    # a window of 4 in both layers: the last 3 tokens are kept, the next one is the fourth; 2 heads of 8
    assert (
        latency(MODELS["mistral"](), prompt=16, context=4, new=2, threads=1, seconds=0.01).kv_bytes
        == 2 * 2 * 2 * 8 * 3 * 4
    )


def test_a_model_without_a_cache_is_refused():
    model = small_llama(use_cache=False)
    model.forward = functools.partial(forget, model.forward)
    with pytest.raises(ModelError, match="LlamaForCausalLM returns no KV cache"):
        latency(model, prompt=4, context=2, new=2)


def forget(forward, input_ids, use_cache):
    return forward(input_ids=input_ids, use_cache=False)


def test_latency_refuses_more_tokens_than_positions(model):
    with pytest.raises(ConfigError, match="64 positions"):
        latency(model, prompt=65, context=8, new=8)
    with pytest.raises(ConfigError, match="64 positions"):
        latency(model, prompt=8, context=60, new=8)


def test_peak_memory_sees_what_was_freed():
    with peak_memory() as idle:
        pass
    with peak_memory() as peak:
        block = torch.ones(2**26)  # 256 MB, every page touched
        del block
    assert peak.rss >= 2**28
    if not peak.since_start:
        assert 0.9 * 2**28 < peak.rss - idle.rss < 1.5 * 2**28
        with peak_memory() as after:
            pass
        assert after.rss < peak.rss - 2**27  # the mark was reset
    assert peak.cuda is None or torch.cuda.is_available()


def test_peak_memory_where_the_mark_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "none")
    with peak_memory() as peak:
        pass
    assert peak.since_start
    assert peak.rss > 2**26  # torch alone is more; kilobytes taken for bytes would be far less
    assert peak.to_dict()["rss"] == peak.rss
