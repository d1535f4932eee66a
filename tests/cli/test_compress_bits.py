"""Plans of bits through `main`: the default solver, the table, both treatments, streamed, what is refused."""

import json

import pytest
from safetensors.torch import load_file

import layerwise as lw
from layerwise.cli import main
from layerwise.plan import GroupBits, Plan, Prune, Quantize, Treatments
from layerwise.structure import structure_of
from models import small_llama

CHOSEN = "--data text.txt --samples 4 --length 32".split()


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def plan(here):
    """Two blocks of the tiny model in 3 and 4 bits, the third left alone."""
    model = small_llama(
        0, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=1
    )
    layers = {
        layer.name: Quantize(bits=3 + int(layer.block.rpartition(".")[2]), group=16)
        for layer in structure_of(model).layers
        if not layer.block.endswith(".2")
    }
    made = Plan(layers=layers)
    made.save(here / "plan.yaml")
    return made


def test_a_plan_of_bits_is_carried_out_by_gptq_and_the_table_says_true_bits(here, plan, same_process, capsys):
    assert main(["compress", "model", *CHOSEN, "--plan", "plan.yaml", "-o", "out"]) == 0
    out, _ = capsys.readouterr()
    # scale and zero: 19 bits to 3-bit groups of 16, 20 to 4-bit ones; both blocks have the same size
    said = "14 layers to 4.719 bits per weight with scales and zeros, 3.500 without (stored in 5.533, see below); the whole model"
    assert said in out.replace("\n", " ")  # transformers reads no zeros: the grids are widened
    assert "pruned" not in out
    assert "gptq" in out
    before, after = (lw.load(here / name).state_dict() for name in ("model", "out"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"{name}.weight" for name in plan.layers}
    saved = Plan.load(here / "out" / "plan.yaml")
    assert saved.layers == Plan(layers=plan.layers).layers
    assert saved.solver["name"] == "gptq"
    record = json.loads((here / "out" / "layerwise.json").read_text())
    assert record["result"]["bits"] == pytest.approx(4.71875)


def test_other_solvers_streamed_and_json(here, plan, same_process, capsys):
    assert main("compress model --plan plan.yaml --solver hqq -o whole --json".split()) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["nominal_bits"] == 3.5
    assert result["bits"] == pytest.approx(3.5 + 2)  # a scale and a float zero of 16 bits each to a group of 16
    assert len(result["layers"]) == 14
    assert main("compress model --plan plan.yaml --solver hqq -o streamed --stream -q".split()) == 0
    whole, streamed = weights(here / "whole"), weights(here / "streamed")
    assert all(tensor.equal(streamed[name]) for name, tensor in whole.items())


def test_zeros_and_bits_are_both_told(here, plan, same_process, capsys):
    both = {
        name: Treatments(prune=Prune(sparsity=0.5, pattern="2:4"), quantize=one.quantize)
        for name, one in plan.layers.items()
    }
    Plan(layers=both).save(here / "both.yaml")
    assert main(["compress", "model", *CHOSEN, "--plan", "both.yaml", "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert "(50.0000%), 14 layers" in out
    assert "quantized" in out


@pytest.mark.parametrize(
    ("method", "bits", "solver"),
    [
        ("lwq --set score=zd --set symmetric=false", "5.3", "hqq"),
        ("lwq --set score=zd", "5.5", "round_to_nearest --solver-set scales=float32"),
        ("least-error --set symmetric=false --set measure=plain --data text.txt --samples 2 --length 32", "5.3", "hqq"),
        ("uniform-bits --set symmetric=false", "3", "hqq --solver-set scales=float32"),
    ],
)
def test_what_is_stored_meets_the_budget_whatever_the_solver_stores(here, same_process, capsys, method, bits, solver):
    levels = [] if bits == "3" else ["--levels", "2,4"]
    words = f"--bits {bits} --set group=16 --solver {solver} -o out --json -q --method {method}".split()
    assert main(["compress", "model", *levels, *words]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    plan = Plan.load(here / "out" / "plan.yaml")
    assert plan.budget.achieved_bits == pytest.approx(result["bits"], rel=1e-12)
    if levels:
        assert float(bits) - 0.7 < result["bits"] <= float(bits)
    # the same plan, counted with whole zeros and scales of 16 bits, takes less than it does in truth
    usual = plan.stored_with(GroupBits()).with_achieved(structure_of(lw.load(here / "model")).layers)
    assert usual.budget.achieved_bits < result["bits"]


def test_a_plan_counted_for_another_solver_is_refused_or_told_as_it_is_stored(here, same_process, capsys):
    made = "plan model --method lwq --set score=zd --set symmetric=false --set group=16 --levels 2,4 -q".split()
    assert main([*made, "--bits", "4.3", "-o", "plan.yaml"]) == 0
    assert main("compress model --plan plan.yaml --solver hqq -o out".split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "budget.bits 4.3 is" in err
    assert "with the solver's scales and zeros of 16 bits. Lower the bits of some, plan for this solver, or" in err
    assert not (here / "out").exists()
    text = (here / "plan.yaml").read_text()
    (here / "plan.yaml").write_text(text.replace("bits: 4.3", "bits: 6.0"))
    assert main("compress model --plan plan.yaml --solver hqq -o out --json -q".split()) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert Plan.load(here / "out" / "plan.yaml").budget.achieved_bits == pytest.approx(result["bits"], rel=1e-12)
    assert result["bits"] > Plan.load(here / "plan.yaml").budget.achieved_bits


def test_least_error_measures_with_the_solver_of_the_command_and_its_settings(here, same_process, capsys):
    words = "--method least-error --bits 3.6 --levels 2,4 --set group=16 --solver round_to_nearest".split()
    assert main(["compress", "model", *words, *CHOSEN, "--solver-set", "mse=true", "-o", "out", "-q"]) == 0
    plan = Plan.load(here / "out" / "plan.yaml")
    assert (plan.method["solver"], plan.method["solver_set"]) == ("round_to_nearest", "mse=true")
    assert plan.solver["mse"]
    again = "--method least-error --bits 3.6 --levels 2,4 --set group=16 --set solver_set=mse=true -q".split()
    assert main(["plan", "model", *again, *CHOSEN, "-o", "again.yaml"]) == 0
    assert Plan.load(here / "again.yaml").scores == plan.scores
    capsys.readouterr()
    assert main(["compress", "model", *words, *CHOSEN, "--set", "solver_set=mse=true", "-o", "twice"]) == 2
    assert "--set solver_set=mse=true: the solver of this command is given by --solver" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--solver wanda", 'solver "wanda" cannot quantize, only prune (14 such layers)'),
        ("--solver round_to_nearest --seed 1", "--seed: not used, since solver round_to_nearest draws nothing"),
        ("--solver round_to_nearest --solver-set grid=float", 'RoundToNearest.grid="float"'),
        ("--solver gtpq", 'unknown solver "gtpq". Did you mean "gptq"?'),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(here, plan, capsys, words, message):
    data = CHOSEN if "wanda" in words else []
    assert main(["compress", "model", *data, "--plan", "plan.yaml", "-o", "out", *words.split()]) == 2
    err = capsys.readouterr().err
    assert message in err.replace("\n", " ")
    assert not (here / "out").exists()
