"""The walk over real (tiny) models of every architecture: exact zeros, right statistics, resume, errors."""

import copy
import dataclasses
import gc
import json
import re
import weakref
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from transformers import MambaConfig, MambaForCausalLM

from layerwise.engine import BlockFinished, BlockStarted, LayerSolved, Settings, Work, compress, walk
from layerwise.engine.walk import run_key
from layerwise.errors import ConfigError, DataError, OutputError, PlanError, SolveError, StatisticsError, WalkError
from layerwise.passes import collect_dense
from layerwise.passes.statistics import Accumulator
from layerwise.plan import Budget, Plan, Prune, Treatments
from layerwise.solvers import GPTQ, Magnitude, Random, SparseGPT, Wanda
from layerwise.solvers.base import Solved
from layerwise.structure import as_matrices, parameter_of, structure_of
from layerwise.tasks.batches import Batches
from models import MODELS, inputs_for


def plan_for(structure, sparsity=0.5):
    layers = {layer.name: Prune(sparsity=round(sparsity * layer.size) / layer.size) for layer in structure.layers}
    return Plan(layers=layers, budget=Budget(sparsity=sparsity))


def data_for(name, model, count=3):
    return Batches(tuple(inputs_for(name, model, seed=seed) for seed in range(count)), {})


def setup(name="llama", sparsity=0.5):
    model = MODELS[name]().eval()
    structure = structure_of(model)
    return model, structure, plan_for(structure, sparsity), data_for(name, model)


def weights(model, structure):
    return {layer.name: parameter_of(model, layer).detach().clone() for layer in structure.layers}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT()], ids=lambda solver: solver.name)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_gets_exactly_the_zeros_of_its_plan(name, solver):
    model, structure, plan, data = setup(name, 0.6)
    before = weights(model, structure)
    result = compress(model, plan, solver=solver, data=data)
    planned = plan.zeros(structure.layers)
    assert {event.layer: event.zeros for event in result.layers} == planned
    for layer in structure.layers:
        weight = parameter_of(model, layer)
        assert int((weight == 0).sum()) == planned[layer.name]
        if solver.name == "wanda":  # it changes nothing that it keeps
            assert torch.equal(weight[weight != 0], before[layer.name][weight != 0])
    others = {name for name, _ in model.named_parameters()} - {layer.parameter for layer in structure.layers}
    untouched = dict(MODELS[name]().named_parameters())
    assert all(torch.equal(dict(model.named_parameters())[other], untouched[other]) for other in others)


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Zeroes nothing but the first weight of each row, and keeps what it was shown."""

    name: ClassVar[str] = "recorder"
    needs: ClassVar[str] = "gram"
    treats: ClassVar[frozenset] = frozenset({"prune"})
    every_pattern: ClassVar[bool] = True
    seen: list = dataclasses.field(default_factory=list)

    def solve(self, weights, inputs, prunes, generators):
        self.seen.append((len(weights), inputs.gram.clone()))
        solved = []
        for weight in weights:
            new = weight.clone()
            new[:, 0] = 0
            solved.append(Solved(new, new != 0))
        return solved


def test_a_block_is_measured_behind_compressed_blocks_and_layers_of_one_input_are_solved_together():
    model, structure, plan, data = setup()
    solver = Recorder()
    compress(model, plan, solver=solver, data=data)
    assert [count for count, _ in solver.seen] == [3, 1, 2, 1] * 2  # qkv, o, gate and up, down
    # `model` is now compressed: statistics of block 1 behind block 0 as it now is, with block 1 itself still dense
    half = MODELS["llama"]().eval()
    half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    second = next(entry for block, entry in collect_dense(half, structure, data, "gram") if block.index == 1)
    assert torch.allclose(solver.seen[4][1], second["model.layers.1.self_attn.q_proj"][0].gram, rtol=1e-5)
    assert torch.allclose(solver.seen[7][1], second["model.layers.1.mlp.down_proj"][0].gram, rtol=1e-5)


def test_propagate_dense_measures_the_untouched_model():
    model, structure, plan, data = setup()
    dense = {}
    for _, entry in collect_dense(model, structure, data, "gram"):
        dense |= entry
    solver = Recorder()
    result = compress(model, plan, solver=solver, data=data, settings=Settings(propagate="dense"))
    assert torch.allclose(solver.seen[7][1], dense["model.layers.1.mlp.down_proj"][0].gram, rtol=1e-5)
    assert result.seconds["propagate"] < result.seconds["collect"]


def test_relative_error_is_what_it_says():
    model, structure, plan, data = setup()
    dense = copy.deepcopy(model)
    result = compress(model, plan, solver=SparseGPT(), data=data, settings=Settings(propagate="dense"))
    statistics = {}
    for _, entry in collect_dense(dense, structure, data, "gram"):
        statistics |= entry
    for event in result.layers:
        layer = structure.layer(event.layer)
        old, new = (as_matrices(parameter_of(m, layer).detach(), layer)[0].double() for m in (dense, model))
        gram = statistics[layer.name][0].gram.double()
        change = ((old - new) @ gram * (old - new)).sum() / ((old @ gram) * old).sum()
        assert event.error == pytest.approx(float(change), rel=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "column", "block(1x7)", "block(4x8)"])
@pytest.mark.parametrize("name", ["mixtral", "convnext"])
def test_layers_of_several_matrices_lose_exactly_what_the_plan_counts_in_every_pattern(name, pattern):
    model = MODELS[name]()
    several = [layer for layer in structure_of(model).layers if layer.matrices > 1]  # experts; depthwise convolutions
    prune = Prune(sparsity=0.3, pattern=pattern)
    layers = [layer for layer in several if not Treatments(prune=prune).problems(layer.rows, layer.columns)]
    plan = Plan(layers={layer.name: prune for layer in layers})
    result = compress(model, plan, solver=Magnitude())
    assert {event.layer: event.zeros for event in result.layers} == plan.zeros(layers)
    assert layers or (name, pattern) in (("mixtral", "block(1x7)"), ("convnext", "block(4x8)"))


def test_kept_weights_of_a_float64_model_stay_bit_identical():
    model, structure, plan, data = setup("llama")
    model.double()
    for layer in structure.layers:
        parameter_of(model, layer).data += 1e-12  # no float32 holds this
    before = weights(model, structure)
    compress(model, plan, solver=Wanda(), data=data)
    for layer in structure.layers:
        kept = (weight := parameter_of(model, layer)) != 0
        assert torch.equal(weight[kept], before[layer.name][kept])


def test_a_new_weight_that_float16_cannot_hold_is_an_error_naming_the_layer():
    @dataclasses.dataclass(frozen=True)
    class Large(Magnitude):
        def solve(self, weights, inputs, prunes, generators):
            return [Solved(torch.full_like(weight, 1e5), torch.ones_like(weight).bool()) for weight in weights]

    model, _, plan, _ = setup("llama")
    with pytest.raises(SolveError, match=r'layer "model.layers.0.self_attn.q_proj": its new weight overflows float16'):
        compress(model.half(), plan, solver=Large())


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT(), Magnitude(), Random()], ids=lambda solver: solver.name)
@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bits(tmp_path, name, solver):
    model, structure, plan, data = setup(name)
    compress(model, plan, solver=solver, data=data)
    expected = weights(model, structure)
    broken = MODELS[name]().eval()
    for event in walk(broken, plan, solver, data, settings=Settings(work=str(tmp_path / "work"))):
        if isinstance(event, LayerSolved) and event.layer.startswith(structure.blocks[1].name):
            break  # killed in the middle of the second block
    again = MODELS[name]().eval()
    events = list(walk(again, plan, solver, data, settings=Settings(work=str(tmp_path / "work"))))
    finished = [event for event in events if isinstance(event, BlockFinished)]
    assert finished[0].resumed
    assert not finished[-1].resumed
    assert same(weights(again, structure), expected)
    assert {e.layer for e in events if isinstance(e, LayerSolved)} == {layer.name for layer in structure.layers}
    third = MODELS[name]().eval()  # everything is there: nothing is solved again
    events = walk(third, plan, solver, data, settings=Settings(work=str(tmp_path / "work")))
    assert all(event.resumed for event in events if isinstance(event, BlockFinished))
    assert same(weights(third, structure), expected)


def test_a_work_folder_of_another_run_is_refused_with_the_difference(tmp_path):
    model, _, plan, data = setup()
    compress(model, plan, solver=Wanda(), data=data, settings=Settings(work=str(tmp_path)))
    fresh = MODELS["llama"]().eval()
    with pytest.raises(ConfigError, match=r"another run \(seed: 0 then, 1 now\)"):
        compress(fresh, plan, solver=Wanda(), data=data, settings=Settings(work=str(tmp_path), seed=1))
    with torch.no_grad():
        fresh.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ConfigError, match=r"another run \(model"):
        compress(fresh, plan, solver=Wanda(), data=data, settings=Settings(work=str(tmp_path)))


@pytest.mark.parametrize("damage", ["cut", "another model", "report", "run"])
def test_a_damaged_work_folder_is_one_line(tmp_path, damage):
    model, _, plan, data = setup()
    settings = Settings(work=str(tmp_path))
    compress(model, plan, solver=Wanda(), data=data, settings=settings)
    file = tmp_path / "blocks" / "model.layers.0.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "another model":
        save_file({"model.layers.7.weight": torch.zeros(2)}, file)
    elif damage == "report":
        file.with_suffix(".json").write_text("[1]")
    else:
        (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"damaged|not readable") as caught:
        compress(MODELS["llama"]().eval(), plan, solver=Wanda(), data=data, settings=settings)
    assert "\n" not in str(caught.value)


def test_a_work_folder_that_cannot_be_made_is_one_line(tmp_path):
    model, _, plan, data = setup()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"work folder .* cannot be made"):
        compress(model, plan, solver=Wanda(), data=data, settings=Settings(work=str(tmp_path / "file" / "work")))


def test_a_work_folder_in_use_is_refused_and_left_alone(tmp_path):
    model, structure, plan, _ = setup()
    settings = Settings(work=str(tmp_path / "work"))
    first = walk(model, plan, Magnitude(), settings=settings)
    next(first)
    other = MODELS["llama"]().eval()
    before, files = weights(other, structure), sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"work\": another run is using it"):
        compress(other, plan, solver=Magnitude(), settings=settings)
    assert same(before, weights(other, structure))
    assert sorted(tmp_path.rglob("*")) == files
    list(first)
    assert not (tmp_path / "work" / "lock").exists()
    compress(
        other, plan, solver=Magnitude(), settings=settings
    )  # the same run again: nothing to solve, nothing in the way
    assert same(weights(model, structure), weights(other, structure))


def test_a_work_folder_held_by_the_caller_stays_held(tmp_path):
    model, _, plan, _ = setup()
    with Work(tmp_path / "a" / "work") as work:
        compress(model, plan, solver=Magnitude(), settings=Settings(work=work))
        assert work.count == 2
        with pytest.raises(ConfigError, match="another run"), Work(work.folder):
            pass
        work.clear()
    assert list(tmp_path.iterdir()) == []  # folders made for it, too


def test_a_run_is_known_by_every_bit_of_its_model_on_any_number_of_threads():
    model, structure, plan, data = setup()
    key = run_key(model, plan, Wanda(), data, Settings(), structure)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert run_key(model, plan, Wanda(), data, Settings(), structure) == key
    finally:
        torch.set_num_threads(threads)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight.copy_(weight.flip(0))  # the same values elsewhere
    assert run_key(model, plan, Wanda(), data, Settings(), structure)["model"] != key["model"]


def test_events_tell_every_block_and_layer_in_order():
    model, structure, plan, data = setup()
    events = list(walk(model, plan, Wanda(), data))
    blocks = [block.name for block in structure.blocks]
    assert [event.block for event in events if isinstance(event, BlockStarted)] == blocks
    finished = [event for event in events if isinstance(event, BlockFinished)]
    assert [(event.index, event.total) for event in finished] == [(0, 2), (1, 2)]
    assert {event.layer for event in events if isinstance(event, LayerSolved)} == set(plan.layers)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named():
    model, structure, plan, data = setup("mixtral")
    one_token = Batches(tuple({"input_ids": batch["input_ids"][:1, :1]} for batch in data[:1]), {})
    result = compress(model, plan, solver=Wanda(), data=one_token)
    notes = [note for note in result.notes if "experts" in note]
    assert len(notes) == 2 * 2 * 2  # 2 of 4 experts are routed to: the others of 2 layers in 2 blocks are named
    assert all("magnitude" in note and "expert " in note for note in notes)
    layer = next(layer for layer in structure.layers if layer.kind == "experts")
    dense = as_matrices(parameter_of(MODELS["mixtral"](), layer).detach(), layer)
    new = as_matrices(parameter_of(model, layer).detach(), layer)
    for note in notes:
        if note.startswith(layer.name):
            expert = int(note.split("expert ")[1].split(":")[0])
            kept = new[expert] != 0
            for row, keep in zip(dense[expert].abs(), kept):
                assert row[keep].min() >= row[~keep].max()


class Taps(torch.nn.Module):
    """Uses the weight of its convolution, one group per channel, without calling the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(4, 4, 3, padding=1, groups=4)

    def forward(self, x):
        return x + torch.nn.functional.conv1d(x, self.conv.weight, self.conv.bias, padding=1, groups=4)


def test_what_every_group_of_a_convolution_says_is_said_once():
    model = torch.nn.Sequential(torch.nn.ModuleList([Taps(), Taps()]))
    model.forward = lambda x: model[0][1](model[0][0](x))
    plan = Plan(layers={f"0.{i}.conv": Prune(sparsity=0.5) for i in range(2)})
    result = compress(model, plan, solver=Wanda(), data=Batches(({"x": torch.ones(2, 4, 5)},), {}))
    why = "its module was never called on calibration data (the model uses its weight directly, or sent no token there)"
    assert result.notes == tuple(f"0.{i}.conv: {why}: pruned by magnitude" for i in range(2))


def test_an_expert_without_tokens_is_not_one_that_was_never_called():
    model, _, plan, _ = setup("mixtral")
    data = Batches(({"input_ids": torch.tensor([[5]])},), {})  # one token goes to 2 of 4 experts
    notes = compress(model, plan, solver=Wanda(), data=data).notes
    assert len(notes) == 2 * 2 * 2  # two blocks, two weights of experts, two experts each
    assert all(re.search(r"expert \d: no calibration token reached it: pruned by magnitude$", note) for note in notes)


def test_weights_of_mamba_that_nobody_calls_say_so():
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, use_mambapy=False)
    with torch.random.fork_rng(devices=[]):
        model = MambaForCausalLM(config).eval()
    plan = Plan(layers={layer.name: Prune(sparsity=0.5) for layer in structure_of(model).layers})
    data = Batches(({"input_ids": torch.arange(8)[None]},), {})
    notes = compress(model, plan, solver=Wanda(), data=data).notes
    unseen = {note.partition(": its module was never called")[0].rpartition(".")[2] for note in notes}
    assert unseen == {"conv1d", "dt_proj"}


def test_data_that_is_no_batches_is_refused_before_any_work():
    model, structure, plan, data = setup()
    before = weights(model, structure)
    with pytest.raises(DataError, match=r"data is a list: wrap .* Batches\("):
        compress(model, plan, solver=Wanda(), data=list(data))
    assert same(before, weights(model, structure))


def test_layers_outside_blocks_can_be_asked_for():
    model = MODELS["cifar_resnet"]().eval()
    structure = structure_of(model, include=["*"])
    outside = {layer.name for layer in structure.outside}
    assert outside
    plan = Plan(layers={name: Prune(sparsity=0.5) for name in sorted(outside)})
    result = compress(model, plan, solver=SparseGPT(), data=data_for("cifar_resnet", model))
    assert {event.layer for event in result.layers} == outside
    assert all(event.tokens for event in result.layers)
    assert not result.notes
    assert result.sparsity == pytest.approx(0.5, abs=0.01)


def test_seed_decides_and_names_keep_streams_apart():
    model, structure, plan, _ = setup()
    other = copy.deepcopy(model)
    third = copy.deepcopy(model)
    compress(model, plan, solver=Random())
    compress(other, plan, solver=Random())
    compress(third, plan, solver=Random(), settings=Settings(seed=1))
    a, b, c = (weights(m, structure) for m in (model, other, third))
    assert same(a, b)
    assert not same(a, c)
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    assert not torch.equal(a[first] == 0, a[second] == 0)


def test_global_random_state_is_left_alone():
    model, _, plan, data = setup()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compress(model, plan, solver=SparseGPT(), data=data)
    assert torch.equal(torch.rand(3), expected)


def test_bad_requests_are_refused_before_any_work(tmp_path):
    model, structure, plan, data = setup()
    before = weights(model, structure)
    with pytest.raises(DataError, match="needs calibration data"):
        compress(model, plan, solver=Wanda())
    with pytest.raises(
        PlanError, match="resize cannot be applied by this version; it applies prune, quantize and factorize"
    ):
        resize = Plan.model_validate({"layers": {"model.layers.0.mlp.up_proj": {"resize": {"channels": 4}}}})
        compress(model, resize, solver=Wanda(), data=data)
    with pytest.raises(PlanError, match=r'Did you mean "model.layers.0.mlp.gate_proj"'):
        compress(model, Plan(layers={"model.layers.0.mlp.gate": Prune(sparsity=0.5)}), solver=Wanda(), data=data)
    with pytest.raises(PlanError, match="multiplies no input"):
        compress(model, Plan(layers={"model.embed_tokens": Prune(sparsity=0.5)}), solver=Wanda(), data=data)
    with pytest.raises(PlanError, match=r'"gptq" prunes unstructured and n:m alone, not in the pattern "row"'):
        rows = Plan(layers={"model.layers.1.mlp.down_proj": Prune(sparsity=0.5, pattern="row")})
        compress(model, rows, solver=GPTQ(), data=data, settings=Settings(work=str(tmp_path / "work")))
    assert not (tmp_path / "work").exists()
    with pytest.raises(ConfigError, match="give a solver"):
        compress(model, plan, solver="wanda", data=data)
    with pytest.raises(ConfigError, match="propagate"):
        Settings(propagate="sparse")
    assert same(weights(model, structure), before)


def test_failures_name_the_layer():
    model, _, plan, data = setup()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises((SolveError, StatisticsError), match=r"model\.layers\.1\.mlp\.(up|gate|down)_proj"):
        compress(model, plan, solver=Wanda(), data=data)


def test_a_block_that_no_batch_reaches_is_an_error():
    model, _, plan, data = setup("llava")
    text_only = Batches(tuple({"input_ids": batch["input_ids"][:, -1:]} for batch in data), {})
    with pytest.raises(WalkError, match="no calibration batch reaches"):
        compress(model, plan, solver=Wanda(), data=text_only)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_dtype_and_count(dtype):
    model, structure, plan, data = setup()
    model = model.to(dtype)
    result = compress(model, plan, solver=SparseGPT(), data=data)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for event in result.layers:
        assert event.zeros >= plan.zeros(structure.layers)[event.layer]  # rounding to half can make a zero more


def test_layers_that_the_plan_keeps_whole_count_in_the_sparsity():
    model, structure, _, data = setup()
    first, second = structure.layers[:2]
    plan = Plan(layers={first.name: Prune(sparsity=0.5), second.name: Prune(sparsity=0.0)})
    result = compress(model, plan, solver=Wanda(), data=data)
    assert [layer.layer for layer in result.layers] == [first.name]
    assert result.kept == second.size
    assert result.sparsity == (first.size // 2) / (first.size + second.size) == plan.achieved_sparsity(structure.layers)


def test_result_is_plain_values():
    model, _, plan, data = setup()
    result = compress(model, plan, solver=Wanda(), data=data)
    facts = json.loads(json.dumps(result.to_dict()))
    assert facts["sparsity"] == 0.5
    assert facts["solver"]["name"] == "wanda"
    assert set(facts["seconds"]) == {"collect", "solve", "propagate", "total"}
    assert facts["data"]["hash"] == data.hash


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_what_a_block_needed_is_given_back_with_it_and_the_model_with_its_last_name(name, monkeypatch):
    model, _, plan, data = setup(name)
    kept = []
    made = Accumulator.__init__

    def watched(self, *arguments):
        made(self, *arguments)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(Accumulator, "__init__", watched)
    gc.collect()
    gc.disable()
    try:
        compress(model, plan, solver=SparseGPT(), data=data)
        assert kept
        assert not [one for one in kept if one() is not None]  # sums of squares and products are what is large
        kept, model = weakref.ref(model), None
        assert kept() is None
    finally:
        gc.enable()
