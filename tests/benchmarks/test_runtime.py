"""The benchmark of what zeros buy in time: its masks, its line of break-even, and a run that goes on after a kill."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "runtime", raising=False)


@pytest.mark.parametrize(("pattern", "unit"), [("1", 1), ("4x1", 4), ("16x16", 256), ("rows", 50), ("2:4", 1)])
def test_masks_have_exact_counts(pattern, unit):
    from runtime import mask

    rows, columns = (64, 48) if pattern != "rows" else (40, 50)
    kept = mask(rows, columns, pattern, 0.5, "a", "cpu")
    assert kept.shape == (rows, columns)
    assert int(kept.sum()) == rows * columns // 2
    assert int(kept.sum()) % unit == 0
    if pattern == "2:4":
        assert (kept.reshape(64, 12, 4).sum(-1) == 2).all()
    assert torch.equal(kept, mask(rows, columns, pattern, 0.5, "a", "cpu"))
    assert mask(30, 50, "16x16", 1.0, "a", "cpu").all()


def row(density, batch, chosen, ratio):
    return {"pattern": "1", "density": density, "batch": batch, "chosen": chosen, "ratios": {chosen: ratio}}


def test_the_line_ends_where_dense_wins_first():
    from runtime import break_even

    rows = [
        *(row(density, 1, "csr", 3 - density) for density in (0.1, 0.3, 0.5)),
        row(0.1, 16, "csr", 2.0), row(0.3, 16, "dense", 1.0), row(0.5, 16, "csr", 1.1),
        row(0.1, 256, "dense", 1.0), row(0.3, 256, "csr", 1.2),
    ]  # fmt: skip
    assert break_even(rows)[-1] == "| 1 | 0.5 (csr 2.50) | 0.1 (csr 2.00) | – |"


def test_it_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    import runtime

    out = tmp_path / "speed.md"
    call = ["runtime.py", "--quick", "--patterns", "16x16", "--densities", "0.1", "--out", str(out), "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(sys, "argv", call)
        runtime.main()
        found = json.loads(out.with_suffix(".json").read_text())
        assert [one["batch"] for one in found["layers"]] == [1, 16, 256] * 2
        assert len(found["models"]) == 6
        assert "## A whole model" in out.read_text()
        del found["models"][3:], found["layers"][5]
        found["layers"][0]["dense_ms"] = 123.0
        out.with_suffix(".json").write_text(json.dumps(found))
        monkeypatch.setattr(sys, "argv", [*call, "--resume"])
        runtime.main()
        again = json.loads(out.with_suffix(".json").read_text())
        assert len(again["layers"]) == len(again["models"]) == 6
        assert again["layers"][0]["dense_ms"] == 123.0
        monkeypatch.setattr(sys, "argv", [*call, "--resume", "--hidden", "128"])
        found["protocol"]["threads"] = 7
        out.with_suffix(".json").write_text(json.dumps(found))
        with pytest.raises(SystemExit, match="measured with"):
            runtime.main()
    finally:
        torch.set_num_threads(threads)
