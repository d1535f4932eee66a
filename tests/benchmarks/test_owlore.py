"""owlore.py end to end on a toy: its accounting of memory is what arithmetic says, rates are looked for, a second run measures nothing."""

from pathlib import Path

import pytest
import torch

from tiny import tiny_llama, tiny_text

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    (tmp_path / "text").mkdir()
    tiny_text(tmp_path / "text/wikipedia-calibration.txt", tokens=4000)
    tiny_llama(tmp_path / "model")
    return tmp_path


def test_a_table_of_measured_and_expected_bytes(bed, monkeypatch, capsys):
    import owlore
    from training_memory import expected

    threads = torch.get_num_threads()
    methods = [name for name in owlore.RECIPES if name != "lora"]
    shape = (
        "--models demo --seeds 1 --steps 16 --period 2 --batch 2 --length 12 --tokens 240 --rank 4 --factor 2".split()
    )
    places = [
        "--demo",
        str(bed / "model"),
        "--bed",
        str(bed),
        "--work",
        str(bed / "work"),
        "--out",
        str(bed / "out.md"),
    ]
    argv = ["owlore.py", *shape, *places, "--methods", ";".join(methods)]
    monkeypatch.setattr("sys.argv", argv)
    owlore.main()
    table = (bed / "out.md").read_text()
    assert all(f"| {name} |" in table for name in methods)
    lines = owlore.Lines(bed / "out.jsonl")
    model = owlore.Subject("demo", bed / "model", bed).load()
    for name, recipe in owlore.RECIPES.items():
        if name == "lora":
            continue
        (row,) = lines.of(method=name, part="judged")
        rank = 4 if recipe.low_rank else 0
        gradients, state = expected(model, recipe.blocks, rank, recipe.always != "")
        assert row["gradients"] == gradients, name
        counters = 4 * len(list(model.parameters())) if not recipe.low_rank else 0  # torch's Adam counts in tensors
        assert (state <= row["state"] <= state + counters) or name == "owlore, reversed", (
            name
        )  # where one block is never drawn
        assert row["saved"] > 0
        assert row["weights"] == sum(one.numel() * 4 for one in model.parameters())
        if not recipe.like:
            tried = [one["loss"] for one in lines.of(method=name, part="tuned")]
            assert len(tried) >= 3
    measured = (bed / "out.jsonl").read_text()
    owlore.main()
    assert (bed / "out.jsonl").read_text() == measured
    assert (bed / "out.md").read_text() == table
    torch.set_num_threads(threads)


def test_what_a_forward_pass_saves_is_counted_once(bed):
    from training_memory import Memory

    linear = torch.nn.Linear(4, 3, bias=False)
    memory = Memory(linear, torch.optim.SGD(linear.parameters(), 0.1))
    x = torch.ones(5, 4)
    with memory.saved():
        loss = (linear(x) + linear(x)).relu().sum()
    loss.backward()
    memory.look()
    # x once, what relu gives (5 x 3) once; the weight is counted as such
    assert memory.most == {"weights": 48, "gradients": 48, "state": 0, "saved": 4 * (20 + 15)}
