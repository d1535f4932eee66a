"""The search: what is tried, who wins, when uniform is returned, and that a killed search goes on."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import layerwise.methods as methods
from layerwise.engine import Settings
from layerwise.errors import BudgetError, ConfigError, DataError
from layerwise.methods import Auto
from layerwise.methods import search as search_room
from layerwise.methods.assemble import found, plan_of
from layerwise.methods.candidates import candidates
from layerwise.methods.tried import Record, Tried, errors_asked, paired
from layerwise.scores import tell
from layerwise.solvers import SparseGPT
from layerwise.structure import structure_of
from layerwise.tasks import Batches
from models import MODELS, inputs_for


@dataclass(frozen=True)
class Shift:
    """Moves sparsity from the second block of a Llama of two to the first, or back where `to_first` is negative."""

    name: ClassVar[str] = "shift"
    summary: ClassVar[str] = "for tests"
    needs_data: ClassVar[bool] = False

    sparsity: float = 0.5
    to_first: float = 0.3

    def plan(self, model, data=None, *, structure=None):
        structure = found(model, structure)
        first = structure.blocks[0].name
        wanted = {
            layer.name: self.sparsity + (self.to_first if layer.block == first else -self.to_first)
            for layer in structure
        }
        return plan_of(self, model, structure, self.sparsity, wanted)


@dataclass(frozen=True)
class Back(Shift):
    name: ClassVar[str] = "back"
    to_first: float = -0.3


@dataclass(frozen=True)
class Impossible(Shift):
    name: ClassVar[str] = "impossible"

    def plan(self, model, data=None, *, structure=None):
        raise BudgetError("not with this model.")


@pytest.fixture
def _short_list(monkeypatch):
    table = {"uniform": methods.Uniform, "random": methods.RandomRatios, "shift": Shift, "back": Back}
    monkeypatch.setattr(methods, "METHODS", {**table, "impossible": Impossible, "auto": Auto})


def _case(batches=8, idle=True):
    """A Llama of two blocks; the first adds (nearly) nothing to the residual stream if idle, so that its weights can go."""
    model = MODELS["llama"]().eval()
    assert len(model.model.layers) == 2
    if idle:
        block = model.model.layers[0]
        with torch.no_grad():
            block.self_attn.o_proj.weight.mul_(1e-3)
            block.mlp.down_proj.weight.mul_(1e-3)
            model.lm_head.weight.mul_(20)  # predictions that say something
    return model, Batches(tuple(inputs_for("llama", model, seed=seed) for seed in range(batches)), {})


@pytest.mark.usefixtures("_short_list")
def test_the_plan_that_spares_the_working_block_wins():
    model, data = _case()
    search = Auto(sparsity=0.5).search(model, data)
    shifted = Shift(sparsity=0.5).plan(model)
    assert search.plan.layers == shifted.layers
    assert search.verdict.startswith("shift: KL divergence")
    by_name = {one.name: one for one in search.tried}
    assert by_name["shift"].divergence < by_name["uniform"].divergence < by_name["back"].divergence
    assert by_name["shift"].unseen < by_name["uniform"].unseen
    assert by_name["impossible"].reason == "not with this model."
    assert by_name["impossible"].divergence is None
    assert search.plan.solver == {
        "name": "wanda",
        "compare": "row",
        "reference": False,
    }  # a plan for another might not suit it
    assert search.plan.method == {
        "name": "auto", "sparsity": 0.5, "only": "", "solver": "wanda", "judged": 8192, "minutes": 0.0, "seed": 0,
        "min_sparsity": 0.0, "max_sparsity": 1.0,
    }  # fmt: skip


@pytest.mark.usefixtures("_short_list")
def test_uniform_is_returned_when_nothing_beats_it_and_said():
    model, data = _case()
    search = Auto(sparsity=0.5, only="back", seed=4).search(model, data)
    random = next(one for one in search.tried if one.name == "random spread=0.08")
    uniform = next(one for one in search.tried if one.name == "uniform")
    assert random.divergence > uniform.divergence  # with this seed; with others chance finds the idle block, too
    assert search.plan.layers == methods.Uniform(sparsity=0.5).plan(model).layers
    assert search.verdict.startswith("uniform: 5 plans tried")
    assert "none is closer" in search.verdict


def test_candidates_are_controls_first_then_those_that_need_no_data_each_with_its_dial_turned():
    names = list(candidates(Auto(sparsity=0.5, only="owl,erk")))
    assert names == [
        "uniform",
        "random spread=0.08", "random spread=0.04", "random spread=0.16",
        "erk power=1", "erk power=0.5", "erk power=2",
        "owl spread=0.08", "owl spread=0.04", "owl spread=0.16",
    ]  # fmt: skip
    everything = {name.split()[0] for name in candidates(Auto(sparsity=0.5))}
    in_bits = {"uniform-bits", "lwq", "least-error", "kvtuner"}  # they share out no sparsity
    others = {"lpvit", "armor", "owlore"}  # of whole blocks, of factors, of training
    shapes = {name for name, method in methods.METHODS.items() if hasattr(method, "parameters")}
    assert everything == set(methods.METHODS) - {"auto"} - in_bits - others - shapes
    with pytest.raises(ConfigError, match='"lwq" is no method to try'):
        Auto(sparsity=0.5, only="lwq")
    bounded = candidates(Auto(sparsity=0.5, only="erk", min_sparsity=0.2, max_sparsity=0.8, seed=3))
    assert bounded["erk power=1"] == methods.ERK(sparsity=0.5, min_sparsity=0.2, max_sparsity=0.8)
    assert bounded["random spread=0.08"].seed == 3


def test_a_killed_search_goes_on_and_ends_alike(tmp_path, monkeypatch):
    model, data = _case(4, idle=False)
    file, auto = tmp_path / "tried.json", Auto(sparsity=0.5, only="erk")
    whole = auto.search(model, data)

    planned = []
    plan = methods.ERK.plan

    def stops_at_the_second(self, *args, **kwargs):
        planned.append(self.power)
        if len(planned) == 2:
            raise KeyboardInterrupt
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(methods.ERK, "plan", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        auto.search(model, data, record=file)
    kept = [one["name"] for one in json.loads(file.read_text())["tried"]]
    assert kept[-1] == "erk power=1"
    seen = []
    again = auto.search(model, data, record=file, progress=lambda done, total, now: seen.append((done, total, now)))
    assert planned[2:][:2] == [0.5, 2.0]  # power 1 was not planned for judging again
    assert again.plan == whole.plan
    assert [(one.name, one.divergence) for one in again.tried] == [(one.name, one.divergence) for one in whole.tried]
    assert seen[-1] == (7, 8, "verdict on unseen data")

    with pytest.raises(ConfigError, match="belongs to another search"):
        Auto(sparsity=0.6, only="erk").search(model, data, record=file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="no readable record"):
        auto.search(model, data, record=file)


def test_without_time_only_uniform_is_tried_and_the_others_say_why():
    model, data = _case(4)
    search = Auto(sparsity=0.5, minutes=1e-9).search(model, data)
    assert [one.reason for one in search.tried] == ["", *["no time was left"] * (len(search.tried) - 1)]
    assert search.verdict.startswith("uniform: 1 plan tried with wanda")


CLOCK = SimpleNamespace(now=0.0, perf_counter=lambda: CLOCK.now)


@dataclass(frozen=True)
class Slow(Shift):
    """Scores of a hundred parts, a second each."""

    name: ClassVar[str] = "slow"

    def plan(self, model, data=None, *, structure=None):
        for done in range(100):
            tell(done, 100)
            CLOCK.now += 1
        tell(100, 100)
        return super().plan(model, data, structure=structure)


@pytest.mark.usefixtures("_short_list")
def test_scores_that_do_not_end_in_time_are_given_up_and_made_by_a_search_with_more(monkeypatch, tmp_path):
    monkeypatch.setitem(methods.METHODS, "slow", Slow)
    monkeypatch.setattr(search_room, "time", CLOCK)
    (model, data), record, seen = _case(4), tmp_path / "record", []
    auto = Auto(sparsity=0.5, only="slow", minutes=1)
    search = auto.search(model, data, record=record, progress=lambda done, total, now: seen.append(now))
    assert search.tried[-1] == Tried("slow", reason="no time was left: 61% of its scores took 1.0 minutes")
    assert "slow: 30% scored" in seen
    for _ in range(3):  # it does not count as one that ends the process
        again = auto.search(model, data, record=record)
        assert again.tried == search.tried
    more = Auto(sparsity=0.5, only="slow", minutes=2).search(model, data, record=record)
    assert more.tried[-1].divergence is not None


def test_bad_requests_are_one_line():
    model, data = _case(1)
    with pytest.raises(DataError, match="two batches or more"):
        Auto().plan(model, data)
    with pytest.raises(DataError, match="two batches or more"):
        Auto().plan(model)
    with pytest.raises(ConfigError, match='Did you mean "erk"'):
        Auto(only="uniform,erkk")
    with pytest.raises(ConfigError, match="sparsegpt"):
        Auto(solver="sparsegtp")
    with pytest.raises(ConfigError, match="minutes"):
        Auto(minutes=-1.0)


def test_a_model_that_denoises_is_judged_by_its_output():
    model = MODELS["dit"]().eval()
    data = Batches(tuple(inputs_for("dit", model, seed=seed) for seed in range(3)), {})
    plan = Auto(sparsity=0.5, only="erk", solver="magnitude").plan(model, data)
    assert plan.achieved_sparsity(structure_of(model)) == pytest.approx(0.5, abs=1e-6)


def test_paired_by_hand():
    # gains 2, 4: deviation sqrt(2), over sqrt(2)
    assert paired(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])) == (3.0, pytest.approx(1.0))
    # in two parts: means 1 and 3 of neighbours that are alike
    four = torch.tensor([1.0, 1.0, 3.0, 3.0])
    assert paired(four, torch.zeros(4), parts=2) == (2.0, pytest.approx(1.0))
    assert paired(torch.tensor([3.0]), torch.tensor([1.0])) == (2.0, math.inf)  # one row can tell nothing
    infinite = torch.tensor([math.inf, 1.0])
    assert paired(torch.tensor([3.0, 1.0]), infinite) == (-math.inf, 0.0)
    assert paired(infinite, torch.tensor([3.0, 1.0])) == (math.inf, 0.0)
    assert Tried("a", 1.0).with_unseen(torch.tensor([1.0, 3.0])).unseen == 2.0
    assert Tried("a", 1.0).with_unseen(None).unseen is None


@pytest.mark.parametrize(
    ("parts", "quantile"), [(4, 3.307), (5, 2.869), (8, 2.429), (16, 2.181), (32, 2.090), (4000, 2.090)]
)
def test_few_rows_must_show_more(parts, quantile):
    """Student's t at the certainty of two errors of a normal, 97.725 %: published tables' values; up to 32 parts are told apart."""
    assert errors_asked(parts) == pytest.approx(quantile, rel=0.02)


@pytest.mark.parametrize(("parts", "quantile"), [(4, 7.126), (8, 3.928), (16, 3.223), (32, 2.971)])
def test_of_eight_that_may_pass_each_must_show_more(parts, quantile):
    """Student's t at an eighth of that chance, by scipy."""
    assert errors_asked(parts, tries=8) == pytest.approx(quantile, rel=0.02)


def test_fewer_than_four_rows_show_nothing():
    assert {errors_asked(rows) for rows in range(4)} == {math.inf}


def test_chance_wins_no_more_often_where_rows_are_few():
    """Differences that are noise: a plan passes in about 2.3 % of cases, whatever their number."""
    generator = torch.Generator().manual_seed(0)
    for rows in (4, 8, 32):
        noise = torch.randn(4000, rows, generator=generator)
        won = 0
        for one in noise:
            gain, error = paired(one, torch.zeros(rows))
            won += gain > errors_asked(rows) * error
        assert won / len(noise) == pytest.approx(0.023, abs=0.008)


def test_the_luckiest_of_eight_wins_no_more_often():
    """As a verdict picks it: least loss on the rows that it is then judged by."""
    generator, won = torch.Generator().manual_seed(0), 0
    for noise in torch.randn(4000, 8, 8, generator=generator):
        gain, error = paired(torch.zeros(8), noise[noise.mean(1).argmin()])
        won += gain > errors_asked(8, tries=8) * error
    assert 0.005 < won / 4000 < 0.03


def test_plans_that_were_judged_are_not_made_again_for_the_verdict(tmp_path, monkeypatch):
    """A search killed at its end: what took the time was scoring."""
    model, data = _case(4, idle=False)
    file, auto = tmp_path / "tried.json", Auto(sparsity=0.5, only="erk")
    whole = auto.search(model, data)

    def killed(self, tried):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(search_room.Hunt, "_verdict", killed)
        auto.search(model, data, record=file)

    def again(self, *args, **kwargs):
        raise AssertionError("planned again")

    for kind in (methods.ERK, methods.Uniform, methods.RandomRatios):
        monkeypatch.setattr(kind, "plan", again)
    resumed = auto.search(model, data, record=file)
    assert resumed.plan == whole.plan
    assert resumed.verdict == whole.verdict


def test_what_runs_out_of_memory_is_a_row_and_does_not_end_the_search(monkeypatch):
    model, data = _case(4)

    def too_large(self, *args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 95 GiB")

    monkeypatch.setattr(methods.ERK, "plan", too_large)
    search = Auto(sparsity=0.5, only="erk").search(model, data)
    reasons = {one.name: one.reason for one in search.tried}
    assert reasons["erk power=1"] == "OutOfMemoryError: tried to allocate 95 GiB"
    assert reasons["uniform"] == ""


def test_what_ends_the_process_twice_is_not_tried_a_third_time(tmp_path):
    key, file = {"model": "a"}, tmp_path / "tried.json"
    for attempt in range(2):
        with Record(file, key) as record:
            assert record.get("snip") is None, attempt
            record.begin("snip")  # killed: neither added nor stopped
    with Record(file, key) as record:
        assert "the process ended 2 times" in record.get("snip").reason
        record.stop("snip")
        assert record.get("snip") is None


def test_two_searches_do_not_share_a_record(tmp_path):
    with (
        Record(tmp_path / "tried.json", {}),
        pytest.raises(ConfigError, match="another search is at it"),
        Record(tmp_path / "tried.json", {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_methods_without_bounds_are_held_to_those_of_the_search():
    model, data = _case(4)
    auto = Auto(sparsity=0.5, only="uniform-plus", min_sparsity=0.4, max_sparsity=0.5005)
    reason = next(one.reason for one in auto.search(model, data).tried if one.name == "uniform-plus")
    assert "outside the bounds" in reason


def test_the_run_that_will_follow_is_the_one_that_is_tried():
    model, data = _case(4)
    solver = SparseGPT(damp=0.5)
    search = Auto(sparsity=0.5, only="erk").search(model, data, solver=solver, settings=Settings(propagate="dense"))
    assert search.plan.solver["damp"] == 0.5
    other = Auto(sparsity=0.5, only="erk").search(model, data, solver=solver)
    assert [one.divergence for one in search.tried] != [one.divergence for one in other.tried]


def test_the_weights_are_whole_afterwards():
    model, data = _case(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Auto(sparsity=0.5, only="owl", solver="sparsegpt").plan(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
