"""Plans that name the blocks which stay."""

from dataclasses import dataclass

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from layerwise.engine.solving import per_matrix
from layerwise.errors import PlanError, ShapeError
from layerwise.plan import Plan, Prune
from layerwise.solvers import Magnitude, Random, Wanda
from layerwise.structure import Layer
from layerwise.treatments import kept_text


@dataclass
class Sized:
    name: str
    size: int
    rows: int
    columns: int


def test_the_digits_by_hand():
    """4 x 6 in blocks of 2 x 2: two rows of three, 101 / 110 -> 1011 10(00)."""
    assert kept_text([True, False, True, True, True, False]) == "xb8"
    prune = Prune(sparsity=2 / 6, pattern="block:2x2", kept="b8")
    assert prune.pattern == "block(2x2)"
    assert prune.blocks_kept(6) == [True, False, True, True, True, False]
    assert prune.zeros(24, 4, 6) == 8
    weight = torch.arange(1.0, 25).reshape(4, 6)
    for solver in (Magnitude(), Random()):
        keep = solver.solve([weight], None, [prune], [torch.Generator()])[0].keep
        assert keep.int().tolist() == [[1, 1, 0, 0, 1, 1]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_digits_come_back(keep):
    text = kept_text(keep)
    assert len(text) == 1 + -(-len(keep) // 4)
    prune = Prune(sparsity=keep.count(False) / len(keep), pattern="block(1x1)", kept=text)
    assert prune.blocks_kept(len(keep)) == keep
    assert prune.zeros(len(keep), 1, len(keep)) == keep.count(False)
    plan = Plan(layers={"a": prune})
    assert Plan.from_text(plan.to_yaml()) == plan
    assert Plan.from_text(plan.to_json(), "p.json") == plan
    again = yaml.safe_dump(yaml.safe_load(plan.to_yaml()))  # under YAML 1.1, whose numbers are others than ours
    assert Plan.from_text(again) == plan
    plan.check([Sized("a", len(keep), 1, len(keep))])


@pytest.mark.parametrize("digits", ["0080", "80", "1e3", "b8"])
def test_digits_are_no_number_to_any_reader(digits):
    """PyYAML writes 0080 without quotes, which is the number 80 in YAML 1.2."""
    keep = [one == "1" for one in format(int(digits, 16), f"0{4 * len(digits)}b")]
    plan = Plan(layers={"a": Prune(sparsity=keep.count(False) / len(keep), pattern="block(1x1)", kept=kept_text(keep))})
    again = Plan.from_text(yaml.safe_dump(yaml.safe_load(plan.to_yaml())))
    assert again == plan
    assert again.layers["a"].prune.blocks_kept(len(keep)) == keep
    bare = Prune(sparsity=keep.count(False) / len(keep), pattern="block(1x1)", kept=digits)
    assert bare == plan.layers["a"].prune
    assert bare.kept == f"x{digits}"


def test_matrices_get_their_own_blocks():
    layer = Layer("e", "e.weight", "experts", "up", (3, 2, 4), 3, 2, 4)
    keep = [True, True, False, True, False, False]  # two blocks of 2 x 2 a matrix
    parts = per_matrix(layer, Prune(sparsity=0.5, pattern="block(2x2)", kept=kept_text(keep)))
    assert [part.blocks_kept(2) for part in parts] == [[True, True], [False, True], [False, False]]
    assert [part.sparsity for part in parts] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{sparsity: 0.5, pattern: block(2x2), kept: xyz}", "give the kept blocks as x and hexadecimal digits"),
        ("{sparsity: 0.5, pattern: block(2x2), kept: x}", "give the kept blocks as x and hexadecimal digits"),
        ("{sparsity: 0.5, kept: xff}", "kept names blocks, and pattern unstructured has none"),
        ("{sparsity: 0.5, pattern: 'block:0x2'}", "write unstructured, row, column"),
    ],
)
def test_bad_entries_are_refused(entry, words):
    with pytest.raises(PlanError) as caught:
        Plan.from_text(f"layerwise: 1\nlayers: {{a: {{prune: {entry}}}}}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sparsity", "kept", "words"),
    [
        (2 / 6, "b", "kept has 1 digits; 6 blocks take 2"),
        (2 / 6, "bb", "the last filled up with zeros"),
        (0.5, "b8", "kept leaves out 2 of 6 blocks, which is a sparsity of 0.3333"),
    ],
)
def test_kept_that_does_not_fit_the_layer_is_a_problem_of_the_plan(sparsity, kept, words):
    prune = Prune(sparsity=sparsity, pattern="block(2x2)", kept=kept)
    with pytest.raises(PlanError) as caught:
        Plan(layers={"a": prune}).check([Sized("a", 24, 4, 6)])
    assert words in str(caught.value)
    with pytest.raises(ShapeError):
        Magnitude().solve([torch.ones(4, 6)], None, [prune], [torch.Generator()])


def test_wanda_without_names_takes_blocks_by_its_own_score():
    from layerwise.passes import InputStatistics

    weight = torch.ones(2, 4)
    inputs = InputStatistics(4, torch.tensor([9.0, 9.0, 1.0, 1.0]))
    keep = Wanda().solve([weight], inputs, [Prune(sparsity=0.5, pattern="block(2x2)")], [torch.Generator()])[0].keep
    assert keep.int().tolist() == [[1, 1, 0, 0]] * 2
