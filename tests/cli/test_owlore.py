"""Plans of training on the command line: made, shown by plan and inspect, edited, compared, refused where they do not fit."""

import json

import pytest

from layerwise.cli import main
from layerwise.plan import Plan, Prune, Quantize, Train

pytestmark = pytest.mark.usefixtures("same_process")
SMALL = "--method owlore --set blocks=2 --set outlier_factor=2.0 --data text.txt --samples 4 --length 16 -q".split()


def test_made_shown_edited_and_compared(here, capsys):
    assert main(["plan", "model", *SMALL, "-o", "train.yaml"]) == 0
    out = capsys.readouterr().out
    assert "owlore: 2 of 3 blocks are trained at a time, others every 50 steps" in out
    assert "trained in" in out
    assert "sampling(model, plan)" in out
    assert "weights become zero" not in out
    plan = Plan.load("train.yaml")
    shares = [entry.train.probability for entry in plan.layers.values()]
    assert sum(shares) == pytest.approx(1)
    for share in shares:
        assert f"{share:.2%}" in out

    text = (here / "train.yaml").read_text().replace(f"probability: {shares[0]!r}", "probability: 0.9, rate: 0.25")
    (here / "edited.yaml").write_text(text)
    for command in (["plan", "model", "--edit", "edited.yaml"], ["inspect", "model", "--plan", "edited.yaml"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert f"{0.9 / (0.9 + sum(shares[1:])):.2%}" in out
        assert "learning rates of 1 layers or blocks, times 0.25 to 0.25" in out
    assert main(["diff", "train.yaml", "edited.yaml"]) == 0
    out = capsys.readouterr().out
    assert "train.probability" in out
    assert "train.rate" in out


def test_inspect_shows_every_kind_of_entry(here, capsys):
    layers = {
        "model.layers.0.mlp.up_proj": Prune(sparsity=0.5),
        "model.layers.1.mlp.up_proj": Quantize(bits=4, group=None),
        "model.layers.2": Train(rate=0.5),
        "lm_head": Train(rate=2.0),
    }
    Plan(layers=layers).save("plan.yaml")
    assert main(["inspect", "model", "--plan", "plan.yaml"]) == 0
    out = capsys.readouterr().out
    for words in ("50.0000% of 1 layers", "bits per weight", "rates of 2 layers or blocks, times 0.5 to 2", "lm_head"):
        assert words in out
    assert main(["inspect", "model", "--plan", "plan.yaml", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["layers"]["lm_head"] == {"train": {"rate": 2.0}}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["plan", "model", *SMALL, "--set", "floor=2"], ["OwLore.floor=2"]),
        (["plan", "model", "--method", "owlore", "--sparsity", "0.5"], ["owlore takes no --sparsity"]),
        (["plan", "model", "--method", "owlore", "--set", "score=uniform", "--set", "blocks=2", "--data", "text.txt"], ["--data"]),
        (["plan", "model", "--method", "owlore", "--set", "score=uniform", "--set", "blocks=9"], ["3 blocks can be drawn"]),
        (["inspect", "model", "--plan", "none.yaml"], ["none.yaml", "cannot read"]),
        (["inspect", "model", "--plan", "wrong.yaml"], ["model.layers.7", "no layer or block"]),
    ],
)  # fmt: skip
def test_bad_requests_are_one_clear_line(here, capsys, command, words):
    Plan(layers={"model.layers.7": Train(rate=0.5)}).save("wrong.yaml")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert "Traceback" not in err
