"""The comparison with llama.cpp: what it compares, and that it says what it needs."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from layerwise.structure import coupled_groups
from models import DECODER, small_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_each_block_has_another_width(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gguf_deci import narrowed, relative_error

    model = narrowed(small_llama(**{**DECODER, "num_hidden_layers": 4}))
    groups = coupled_groups(model).groups
    assert [group.units for group in groups if group.kind == "channels"] == [64, 56, 40]  # 64 - 8 i, without the third
    assert [group.units for group in groups if group.kind == "heads"] == [2, 1, 2]
    assert relative_error(np.array([[1.0, -4.0]]), np.array([[1.5, -3.0]])) == 0.25


@pytest.mark.skipif(find_spec("llama_cpp") is not None, reason="llama-cpp-python is here")
def test_it_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gguf_deci.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "gguf_deci.py needs llama-cpp-python: pip install llama-cpp-python (it builds llama.cpp)."
    )
