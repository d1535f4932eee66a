"""Every method is one row, and passes the same real checks. A new method adds its row here."""

import copy
import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

import layerwise.errors as errors
import layerwise.solvers as solvers
from layerwise.engine import compress
from layerwise.methods import METHODS, method_from
from layerwise.plan import Plan
from layerwise.solvers import Magnitude
from layerwise.structure import structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for
from rounding import Rounding


@dataclass(frozen=True)
class Row:
    method: str
    settings: dict = field(default_factory=dict)  # beside the budget
    bad: dict = field(default_factory=dict)  # settings that must be refused, and with what word
    word: str = ""
    highest: float = 0.9  # sparsity that every model of the table has room for
    even: bool = False  # the same sparsity for all, up to a weight
    caps: bool = True  # takes min_sparsity and max_sparsity
    loss: bool = False  # looks at a loss: of the table's models, one has none that is known
    bits: bool = False  # hands out bits: the levels are 2 and 4, and a sparsity here stands for how far down it goes


ROWWISE = {
    "group": 0,
    "nominal": True,
}  # one scale for each row, since the tiny models' inputs have few common divisors
ROWS = [
    Row("uniform", bad={"indivisible": "skip"}, word="indivisible", even=True, caps=False),
    Row("uniform-plus", bad={"last_density": 1.5}, word="last_density", highest=0.6, caps=False),
    Row("er", bad={"max_sparsity": 0.2, "min_sparsity": 0.3}, word="min_sparsity"),
    Row("erk", bad={"power": -1.0}, word="power"),
    Row("erk-plus", bad={"dense": 3}, word="dense=3: give text", highest=0.6),
    Row("owl", settings={"outlier_factor": 2.0}, bad={"outlier_factor": 0.5}, word="outlier_factor"),
    Row("ecoflap", settings={"samples": 2}, bad={"order": "second"}, word="order", loss=True),
    Row("alpha-pruning", settings={"fit": "mid"}, bad={"spread": 1.5}, word="spread"),
    Row("farms", settings={"window": 8, "fit": "mid"}, bad={"per": "model"}, word="per"),
    Row("snip", bad={"max_sparsity": 1.5}, word="max_sparsity", loss=True),
    Row("snip-ratio", settings={"seed": 3}, bad={"redraw": 1}, word="redraw=1: give true or false", loss=True),
    Row("grasp", bad={"temperature": 0.0}, word="temperature", loss=True),
    Row("grasp-ratio", settings={"temperature": 1.0}, bad={"temperature": -1.0}, word="temperature", loss=True),
    Row("synflow", settings={"rounds": 3}, bad={"rounds": 0}, word="rounds"),
    Row(
        "lpvit",
        settings={"pattern": "block(1x1)", "cost": "weights", "samples": 3},  # blocks of one weight meet any budget
        bad={"order": "best"},
        word="order",
        loss=True,
    ),
    Row("random", settings={"seed": 3}, bad={"spread": -0.1}, word="spread"),
    Row("auto", settings={"only": "erk", "solver": "magnitude"}, bad={"only": "eerk"}, word='"erk"'),
    Row("uniform-bits", settings={"group": 0}, bad={"bits": 9}, word="bits=9", bits=True, even=True),
    Row("lwq", settings={"score": "zd", **ROWWISE}, bad={"levels": "2,9"}, word="levels", bits=True),
    Row(
        "least-error",
        settings={"measure": "relative", "granularity": "layer", "solver": "rounding", **ROWWISE},
        bad={"rule": "best"},
        word="rule",
        bits=True,
    ),
]
SOME_MODELS = ("llama", "cifar_resnet", "mixtral", "t5", "gpt2", "phi3", "vit", "flux")
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.method)
sparse = pytest.mark.parametrize("row", [row for row in ROWS if not row.bits], ids=lambda row: row.method)
in_bits = pytest.mark.parametrize("row", [row for row in ROWS if row.bits], ids=lambda row: row.method)
models = pytest.mark.parametrize("name", SOME_MODELS)


WITH_LABELS, WITHOUT_LOSS = ("cifar_resnet", "vit"), ("flux",)


def data_for(name, model):
    images = 8 if name in WITH_LABELS else 2  # a search asks for more than two that it did not see
    batches = [inputs_for(name, model, batch=images, seed=seed) for seed in range(2)]
    if name in WITH_LABELS:  # ViTForImageClassification has two classes
        batches = [{**batch, "labels": torch.tensor([1, 0] * 4)} for batch in batches]
    return Batches(tuple(batches), {})


@pytest.fixture(autouse=True)
def _solver_of_the_tests(monkeypatch):
    monkeypatch.setitem(solvers.SOLVERS, "rounding", Rounding)


def made(row, sparsity, **settings):
    budget = {"sparsity": sparsity}
    if row.bits:
        budget = {"bits": round(4 - 2 * sparsity) if row.even else 4 - 2 * sparsity}
    return method_from(row.method, **{**budget, **row.settings, **settings})


def meets_its_budget(plan, layers, row):
    """All zeros to the last; or no more bits than that, and room for less than one step of what shares a level."""
    if not row.bits:
        assert sum(plan.zeros(layers).values()) == round(plan.budget.sparsity * sum(layer.size for layer in layers))
        return
    total = sum(layer.size for layer in layers)
    assert plan.budget.nominal_bits == plan.achieved_bits(layers, nominal=True) <= plan.budget.bits
    assert plan.budget.achieved_bits == plan.achieved_bits(layers) > plan.budget.nominal_bits
    left = (plan.budget.bits - plan.budget.nominal_bits) * total
    assert left < 2 * max(_together(layers, row)) * (0.001 if row.even else 1)


def _together(layers, row):
    """Weights of what shares a level, by the settings of the row."""
    if row.settings.get("granularity") == "layer":
        return [layer.size for layer in layers]
    blocks = {layer.block for layer in layers}
    return [sum(layer.size for layer in layers if layer.block == block) for block in blocks]


def skip_without_loss(row, name):
    if row.loss and name in WITHOUT_LOSS:
        model = MODELS[name]()
        with pytest.raises(errors.ModelError, match=r"has no loss that is known"):
            made(row, 0.5).plan(model, data_for(name, model))
        pytest.skip(f"{name} has no loss that is known")


def planned(row, name, sparsity, structure=None):
    model = MODELS[name]()
    return made(row, sparsity).plan(model, data_for(name, model), structure=structure)


def test_every_method_has_its_row():
    assert [row.method for row in ROWS] == [
        name
        for name, method in METHODS.items()
        if name not in ("kvtuner", "armor", "owlore") and not hasattr(method, "parameters")
    ]  # those decide for caches, for factors, for training, and for widths (test_widths.py)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert "\n" not in method.summary
        assert method.__dataclass_params__.frozen


@sparse
@models
def test_the_budget_is_met_exactly(row, name):
    skip_without_loss(row, name)
    layers = structure_of(MODELS[name]()).layers
    total = sum(layer.size for layer in layers)
    for sparsity in (0.0, 0.37, 0.5, row.highest):
        plan = planned(row, name, sparsity)
        assert list(plan.layers) == [layer.name for layer in layers]
        assert sum(plan.zeros(layers).values()) == round(sparsity * total)
        assert plan.budget.sparsity == sparsity
        assert plan.budget.achieved == round(sparsity * total) / total
        plan.check(layers, fingerprint=structure_of(MODELS[name]()).fingerprint)


@rows
def test_empty_matrices_are_passed_by(row):
    """What a cut left without channels has nothing to give up, and is nothing to trip over."""
    model = MODELS["llama"]()
    mlp, hidden = model.model.layers[0].mlp, model.config.hidden_size
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(hidden, 0, bias=False) for _ in range(2))
    mlp.down_proj = torch.nn.Linear(0, hidden, bias=False)
    structure = structure_of(model)
    assert len(structure.layers) == 11
    assert {reason for layer, reason in structure.left_out if not layer.size} == {"it is empty"}
    plan = made(row, 0.37).plan(model, data_for("llama", model))
    assert list(plan.layers) == [layer.name for layer in structure]
    meets_its_budget(plan, structure.layers, row)
    compress(
        model,
        plan,
        solver=solvers.RoundToNearest() if row.bits else Magnitude(),
        data=data_for("llama", model),
    )


@in_bits
@models
def test_bits_stay_within_the_budget(row, name):
    layers = structure_of(MODELS[name]()).layers
    for share in (0.0, 0.37, 0.5, 1.0):
        plan = planned(row, name, share)
        assert list(plan.layers) == [layer.name for layer in layers]
        assert {entry.quantize.bits for entry in plan.layers.values()} <= {2, 3, 4}
        meets_its_budget(plan, layers, row)
        plan.check(layers, fingerprint=structure_of(MODELS[name]()).fingerprint)


@rows
@models
def test_a_second_run_gives_the_same_plan_and_the_model_is_untouched(row, name):
    skip_without_loss(row, name)
    model = MODELS[name]().train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    method, data = made(row, 0.5), data_for(name, model)
    first = method.plan(model, data)
    assert method.plan(model, data).to_yaml() == first.to_yaml() == planned(row, name, 0.5).to_yaml()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@rows
def test_the_plan_survives_save_and_load(row, tmp_path):
    plan = planned(row, "llama", 0.37)
    layers = structure_of(MODELS["llama"]()).layers
    for ending in ("yaml", "json"):
        plan.save(tmp_path / f"plan.{ending}")
        loaded = Plan.load(tmp_path / f"plan.{ending}")
        assert loaded == plan
        assert loaded.zeros(layers) == plan.zeros(layers)
    settings = dict(loaded.method)
    assert method_from(settings.pop("name"), **settings) == made(row, 0.37)
    assert loaded.model.name == "LlamaForCausalLM"
    assert loaded.model.parameters == sum(parameter.numel() for parameter in MODELS["llama"]().parameters())


@sparse
def test_applied_the_zeros_are_those_of_the_plan(row):
    model = MODELS["cifar_resnet"]()
    structure = structure_of(model, include=["*"])  # stem and head, too
    plan = made(row, 0.5).plan(model, data_for("cifar_resnet", model), structure=structure)
    result = compress(model, plan, solver=Magnitude(compare="layer"))
    zeros = {layer.name: int((model.get_parameter(layer.parameter) == 0).sum()) for layer in structure}
    assert zeros == plan.zeros(structure.layers)
    assert result.zeros == round(0.5 * sum(layer.size for layer in structure))


@sparse
def test_other_models_get_other_plans_but_uniform(row):
    """A method that says uniform by another name would pass everything else."""
    plan = planned(row, "cifar_resnet", 0.5)
    sizes = {layer.name: layer.size for layer in structure_of(MODELS["cifar_resnet"]()).layers}
    off = {name: abs(entry.prune.sparsity - 0.5) * sizes[name] for name, entry in plan.layers.items()}
    assert (max(off.values()) <= 1) == row.even


@in_bits
def test_bits_differ_between_layers_but_for_uniform(row):
    for name in ("cifar_resnet", "llama"):
        plan = planned(row, name, 0.5)
        assert len({entry.quantize.bits for entry in plan.layers.values()}) == (1 if row.even else 2)


@in_bits
def test_an_average_that_no_levels_give_says_what_they_give(row):
    model = MODELS["llama"]()
    if row.even:
        return  # its bits are the level
    for bits in (1.9, 4.1):
        with pytest.raises(errors.BudgetError, match=r"take 2 to 4 bits per weight") as caught:
            made(row, 0.5, bits=bits).plan(model, data_for("llama", model))
        assert "\n" not in str(caught.value)


@rows
def test_layers_left_out_stay_out(row):
    structure = structure_of(MODELS["llama"](), exclude=["*.down_proj"])
    plan = planned(row, "llama", 0.5, structure)
    assert plan.layers.keys() == {layer.name for layer in structure.layers}
    assert not any("down_proj" in name for name in plan.layers)
    meets_its_budget(plan, structure.layers, row)


@sparse
def test_floors_and_caps_hold(row):
    if not row.caps:
        with pytest.raises(errors.ConfigError, match="has no setting"):
            made(row, 0.5, max_sparsity=0.6)
        return
    model = MODELS["cifar_resnet"]()
    data, structure = data_for("cifar_resnet", model), structure_of(model, include=["*"])
    plan = made(row, 0.5, min_sparsity=0.45, max_sparsity=0.53).plan(model, data, structure=structure)
    sparsities = [entry.prune.sparsity for entry in plan.layers.values()]
    dense = int(row.method == "erk-plus")  # what it keeps dense has no floor
    assert sum(value == 0 for value in sparsities) == dense
    assert all(0.45 <= value <= 0.53 for value in sparsities if value)
    assert len({round(value, 3) for value in sparsities if value}) > 1
    with pytest.raises(errors.BudgetError, match=r"Raise max_sparsity to 0\.5"):
        made(row, 0.5, max_sparsity=0.4).plan(model, data, structure=structure)
    with pytest.raises(errors.BudgetError, match=r"Lower min_sparsity to 0\.5"):
        made(row, 0.5, min_sparsity=0.9).plan(model, data, structure=structure)


@sparse
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.2, float("nan")])
def test_a_sparsity_out_of_range_is_refused(row, sparsity):
    with pytest.raises(errors.ConfigError, match="0 <= sparsity < 1"):
        made(row, sparsity)


@rows
def test_bad_settings_are_refused(row):
    with pytest.raises(errors.ConfigError, match=row.word) as caught:
        method_from(row.method, **{**row.settings, **row.bad})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    wrong, right = ("bitz", "bits") if row.bits else ("sparsty", "sparsity")
    with pytest.raises(errors.ConfigError, match=rf'has no setting "{wrong}". Did you mean "{right}"\?'):
        method_from(row.method, **{wrong: 0.5})


@rows
def test_a_method_that_needs_data_says_so_and_others_do_without(row):
    model = MODELS["llama"]()
    if made(row, 0.5).needs_data:
        for data in (None, Batches((), {})):
            with pytest.raises(errors.DataError, match="needs calibration data"):
                made(row, 0.5).plan(model, data)
    else:
        assert made(row, 0.5).plan(model) == planned(row, "llama", 0.5)


@rows
def test_a_model_with_nothing_to_compress_is_refused(row):
    model = torch.nn.Linear(4, 4)
    data = Batches(({"input": torch.ones(1, 4)},), {})
    with pytest.raises(errors.ModelError, match="Linear: no layer is up for compression"):
        made(row, 0.5).plan(model, data)


@rows
def test_settings_are_flat_plain_values(row):
    for value in dataclasses.asdict(METHODS[row.method]()).values():
        assert type(value) in (int, float, str, bool)
