"""from_scratch.py and training_gpu.py: what they compute, and that the second one's methods run."""

import math
import sys
from pathlib import Path

import pytest
import torch

from models import small_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_where_a_curve_comes_down_to_a_loss():
    from from_scratch import reached

    curve = [(100, 4.0), (400, 3.0), (1600, 2.0)]
    assert reached(curve, 4.0) == 100
    assert reached(curve, 3.0) == pytest.approx(400)
    assert reached(curve, 2.5) == pytest.approx(800)  # half way on a logarithmic line
    assert reached(curve, 1.9) is None


def test_a_model_that_starts_anew_knows_nothing_and_starts_alike():
    from from_scratch import forget

    first, second = small_llama(), small_llama()
    with torch.no_grad():
        second.model.embed_tokens.weight.mul_(3)
    for model in (first, second):
        forget(model)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert first.model.norm.weight.eq(1).all()
    ids = torch.arange(16)[None]
    loss = first(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(first.config.vocab_size), abs=0.2)


def test_every_method_trains_the_toy(monkeypatch, capsys, tmp_path):
    import training_gpu

    out = tmp_path / "t.md"
    monkeypatch.setattr(sys, "argv", ["training_gpu.py", "--toy", "--out", str(out)])
    training_gpu.main()
    table = out.read_text()
    assert all(f"\n| {name} | " in table for name in training_gpu.METHODS)
    assert "no claim" in table
