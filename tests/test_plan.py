"""The plan file: round trips, exact counts, every kind of bad input in one line, and what hand edits need."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from layerwise.errors import BudgetError, OutputError, PlanError, SelectionError
from layerwise.plan import Budget, Change, ModelFacts, Plan, Prune, Quantize, Treatments, diff_plans
from layerwise.plan_shift import shift_evenly


@dataclass(frozen=True)
class Sized:
    name: str
    rows: int
    columns: int
    matrices: int = 1

    @property
    def size(self) -> int:
        return self.matrices * self.rows * self.columns


LAYERS = [
    Sized("blocks.0.q", 10, 10),
    Sized("blocks.0.up", 30, 10),
    Sized("blocks.1.q", 10, 10),
    Sized("blocks.1.up", 30, 10),
]
BLOCKS = ["blocks.0", "blocks.1"]
HEAD = "layerwise: 1\nlayers:\n"


def uniform(sparsity: float, **fields: object) -> Plan:
    return Plan(
        budget=Budget(sparsity=sparsity), layers={layer.name: Prune(sparsity=sparsity) for layer in LAYERS}, **fields
    )


def problems(text: str, source: str = "p.yaml") -> tuple[str, ...]:
    with pytest.raises(PlanError) as error:
        Plan.from_text(text, source)
    assert all("\n" not in line for line in error.value.problems)
    return error.value.problems


def misfits(plan: Plan, **options: object) -> tuple[str, ...]:
    with pytest.raises(PlanError) as error:
        plan.check(LAYERS, blocks=BLOCKS, **options)
    assert all("\n" not in line for line in error.value.problems)
    return error.value.problems


fractions = st.floats(0, 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
AWKWARD = [
    "0",
    "no",
    "on",
    "null",
    "1e-3",
    "1:20",
    "~",
    "a: b",
    "#",
    "...",
    "- a",
    "=",
    "<<",
    "2026-01-01",
    "a\n b",
    "\x85",
    "\u2028 a",
    "\ufeff",
]
names = st.text(min_size=1) | st.sampled_from(AWKWARD)

prunes = st.builds(Prune, sparsity=fractions) | st.sampled_from(
    [Prune(sparsity=0.5, pattern="2:4"), Prune(sparsity=0.75, pattern="1:4")]
)
quantizes = st.builds(Quantize, bits=st.integers(1, 16), group=st.none() | st.integers(1, 512), symmetric=st.booleans())
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
plans = st.builds(
    Plan,
    model=st.none() | st.builds(ModelFacts, name=names, parameters=st.integers(0), fingerprint=names),
    method=st.dictionaries(names, plain, max_size=3),
    solver=st.none() | st.dictionaries(names, plain, min_size=1, max_size=3),
    budget=st.builds(Budget, sparsity=st.none() | fractions, bits=st.none() | st.floats(0, 16)),
    layers=st.dictionaries(
        names,
        prunes | quantizes | st.builds(Treatments, prune=prunes, quantize=quantizes) | st.just(Treatments(drop=True)),
        max_size=4,
    ),
    scores=st.dictionaries(names, numbers, max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(plans)
def test_yaml_and_json_give_back_the_same_plan(plan):
    assert Plan.from_text(plan.to_yaml(), "p.yaml") == plan
    assert Plan.from_text(plan.to_json(), "p.json") == plan
    assert Plan.from_text(plan.to_yaml()).fingerprint == plan.fingerprint


def test_one_line_a_layer_that_a_person_can_read():
    plan = Plan(layers={"a.q": Prune(sparsity=0.5, pattern="2:4"), "a": {"drop": True}}, scores={"a": 1e-07})
    assert plan.to_yaml() == (
        "layerwise: 1\nlayers:\n  a.q: {prune: {sparsity: 0.5, pattern: '2:4'}}\n  a: {drop: true}\nscores:\n  a: 1.0e-07\n"
    )


def test_words_by_hand_mean_what_they_look_like():
    """PyYAML by itself reads 2:4 as 124, 1e-3 as a string, on as true."""
    plan = Plan.from_text(
        "layerwise: 1\nmethod: {step: 1e-3, on: yes, n: 010}\nlayers:\n  0: {prune: {sparsity: 0.5, pattern: 2:4}}\n"
    )
    assert plan.layers["0"].prune == Prune(sparsity=0.5, pattern="2:4")
    assert plan.method == {"step": 0.001, "on": "yes", "n": 10}


def test_save_and_load_and_no_overwriting(tmp_path):
    for name in ("deep/plan.yaml", "plan.json"):
        plan = uniform(0.5, method={"name": "uniform"})
        plan.save(tmp_path / name)
        assert Plan.load(tmp_path / name) == plan
        with pytest.raises(OutputError, match="exists already"):
            uniform(0.6).save(tmp_path / name)
        uniform(0.6).save(tmp_path / name, force=True)
        assert Plan.load(tmp_path / name).budget.sparsity == 0.6
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "plan.json", "plan.yaml"]
    with pytest.raises(OutputError, match="cannot be written"):
        uniform(0.5).save(tmp_path / "plan.json/plan.yaml")


def test_settings_dataclasses_and_bare_treatments():
    @dataclass(frozen=True)
    class Owl:
        spread: float = 0.08
        sizes: tuple[int, ...] = (1, 2)

    plan = Plan(method=Owl(), layers={"a": Quantize(bits=4)})
    assert plan.method == {"name": "owl", "spread": 0.08, "sizes": [1, 2]}
    assert plan.layers["a"].quantize == Quantize(bits=4)
    with pytest.raises(ValidationError, match="settings are plain values"):
        Plan(method={"what": object()}, layers={})


def test_numpy_numbers_become_plain_ones():
    plan = Plan(layers={"a": Prune(sparsity=np.float32(0.5))}, scores={"a": np.float64(2)})
    assert type(plan.layers["a"].prune.sparsity) is float
    assert "a: 2.0" in plan.to_yaml()


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("{prune: {sparsity: 1.2}}", "prune.sparsity 1.2: give the fraction removed, 0 <= sparsity <= 1."),
        ("{prune: {sparsity: -0.1}}", "prune.sparsity -0.1: give the fraction removed, 0 <= sparsity <= 1."),
        ("{prune: {sparsity: .nan}}", "prune.sparsity nan: give the fraction removed, 0 <= sparsity <= 1."),
        ("{prune: {sparsity: true}}", "prune.sparsity True: give the fraction removed, 0 <= sparsity <= 1."),
        ("{prune: {sparsity: '0.5'}}", "prune.sparsity '0.5': give the fraction removed, 0 <= sparsity <= 1."),
        ("{prune: {}}", '"prune.sparsity" is missing: give the fraction removed, 0 <= sparsity <= 1.'),
        ("{prune: {sparsty: 0.5, sparsity: 0.5}}", 'unknown key "prune.sparsty". Did you mean "sparsity"?'),
        ("{prune: {zzz: 0.5, sparsity: 0.5}}", 'unknown key "prune.zzz". Known keys: sparsity, pattern, kept.'),
        ("{purne: {sparsity: 0.5}}", 'unknown key "purne". Did you mean "prune"?'),
        ("{prune: {sparsity: 0.5, pattern: 4:2}}", "prune.pattern '4:2': write unstructured, row, column, n:m with 0 < n <= m"),
        ("{prune: {sparsity: 0.5, pattern: block(0x4)}}", "prune.pattern 'block(0x4)': write unstructured, row, column"),
        ("{prune: {sparsity: 0.6, pattern: 2:4}}", "prune: pattern 2:4 means sparsity 0.5, not 0.6: change one of them."),
        ("{quantize: {bits: 17}}", "quantize.bits 17: give whole bits, 1 to 16."),
        ("{quantize: {bits: 4.5}}", "quantize.bits 4.5: give whole bits, 1 to 16."),
        ("{cache: {key_bits: 0, value_bits: 4}}", "cache.key_bits 0: give 2, 4, 8, or 16 for full precision."),
        ("{cache: {key_bits: 3, value_bits: 4}}", "cache.key_bits 3: give 2, 4, 8, or 16 for full precision."),
        ("{cache: {key_bits: 8, value_bits: 4, mode: kivy}}", "cache.mode 'kivy': give per-token or kivi."),
        ("{keep_tokens: {}}", "keep_tokens: give either count or fraction."),
        ("{resize: {}}", "resize: empty; give heads or kv_heads or channels."),
        ("{factorize: {block: 8}, prune: {sparsity: 0.5}}", "factorize goes with neither prune nor quantize: keep one of them."),
        ("{drop: true, prune: {sparsity: 0.5}}", "drop goes with nothing else, not with prune."),
        ("{drop: false}", "drop False: write true, or leave it out."),
        ("{}", "no treatment given; leave the layer out to leave it alone."),
        ("0.5", "Input should be a valid dictionary or instance of Treatments"),
    ],
)  # fmt: skip
def test_a_bad_treatment_names_layer_value_and_what_would_be_right(entry, line):
    (got,) = problems(f"{HEAD}  blocks.0.q: {entry}\n")
    assert got.startswith('p.yaml: layer "blocks.0.q": ')
    assert line in got


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "p.yaml: it is empty"),
        (" \n\n", "p.yaml: it is empty"),
        ("- a\n", "a plan is a mapping that starts with 'layerwise: 1'"),
        ("just words", "a plan is a mapping that starts with 'layerwise: 1'"),
        ("layers: {}\n", "a plan is a mapping that starts with 'layerwise: 1'"),
        ("layerwise: 2\nlayers: {}\n", "p.yaml: layerwise 2: this layerwise reads format 1"),
        ("layerwise: 1\n", 'p.yaml: "layers" is missing.'),
        ("layerwise: 1\nlayer: {}\nlayers: {}\n", 'p.yaml: unknown key "layer". Did you mean "layers"?'),
        (
            "layerwise: 1\nlayers: {}\nbudget: {sparsity: 1.2}\n",
            "budget.sparsity 1.2: give the fraction removed, 0 <= sparsity <= 1.",
        ),
        (
            "layerwise: 1\nlayers: {}\nbudget: {sparcity: 0.2}\n",
            'unknown key "budget.sparcity". Did you mean "sparsity"?',
        ),
        ("layerwise: 1\nlayers: {}\nscores: {a: .inf}\n", "scores.a inf"),
        (f"{HEAD}\tblocks.0.q: {{drop: true}}\n", "p.yaml, line 3: not valid YAML"),
        (f"{HEAD}  a: {{drop: true}}\n  a: {{drop: true}}\n", "p.yaml, line 4: not valid YAML: 'a' is given twice."),
        (f"{HEAD}  ? [a]\n  : 1\n", "p.yaml, line 3: not valid YAML: a key must be a name."),
        (f"{HEAD}  a: {{drop: true\n", "not valid YAML"),
        (
            "layerwise: 1\nlayers: !!python/object/apply:os.system [ls]\n",
            "not valid YAML: could not determine a constructor",
        ),
        ("layerwise: 1\nlayers: \x00\n", "not valid YAML"),
        ("[" * 3000, "nested too deeply"),
        (f"layerwise: 1\nlayers: {{}}\nbudget: {{bytes: {'9' * 5000}}}\n", "holds a number that cannot be read"),
    ],
)
def test_a_file_that_is_no_plan(text, line):
    assert any(line in problem for problem in problems(text))


def test_tabs_are_called_tabs():
    for text in (f"{HEAD}\ta: {{drop: true}}\n", f"{HEAD}  a:\n\t  drop: true\n"):
        assert "Use spaces, not tabs." in problems(text)[0]


def test_bad_json():
    assert "holds a number that cannot be read" in problems(f'{{"layerwise": 1, "budget": {"9" * 5000}}}', "p.json")[0]
    assert problems('{"layerwise": 1,', "p.json")[0].startswith("p.json, line 1: not valid JSON")
    assert (
        '"a" is given twice'
        in problems('{"layerwise": 1, "layers": {"a": {"drop": true}, "a": {"drop": true}}}', "p.json")[0]
    )


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(PlanError, match="not a text file"):
        Plan.load(tmp_path / "binary")
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(PlanError, match="cannot read the plan"):
            Plan.load(path)


def test_all_problems_are_listed_not_only_the_first():
    text = f"{HEAD}  a: {{prune: {{sparsity: 1.2}}}}\n  b: {{prune: {{sparsity: 2}}}}\n  c: {{quantise: 4}}\n"
    assert [problem.split('"')[1] for problem in problems(text)] == ["a", "b", "c"]
    plan = Plan(
        layers={
            "blocks.0.k": Prune(sparsity=0.5),
            "blocks.0.q": Prune(sparsity=0.5, pattern="2:4"),
            "blocks.0": Prune(sparsity=0.5),
        }
    )
    assert misfits(plan) == (
        'plan: entry 1, "blocks.0.k": the model has no layer or block of this name. Did you mean "blocks.0.q"?',
        'plan: entry 2, "blocks.0.q": 10 outputs x 10 inputs do not split into groups of 4 inputs for 2:4.'
        " Leave it out or use unstructured.",
        'plan: entry 3, "blocks.0": prune needs a layer with a weight. Name the layers inside it.',
    )


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"blocks.0.up": Prune(sparsity=0.5, pattern="block(4x5)")}, "do not split into block(4x5)"),
        ({"blocks.0.up": Quantize(bits=4, group=128)}, "do not split into quantization groups of 128"),
        ({"blocks.0.up": {"factorize": {"block": 4}}}, "do not split into diagonal blocks of 4"),
        (
            {"blocks.0.up": {"drop": True}},
            "drop removes a whole block, and this is none. Name a block such as blocks.0.",
        ),
        ({"blocks.0": {"drop": True}, "blocks.0.up": Prune(sparsity=0.5)}, 'the plan drops "blocks.0", which holds it'),
    ],
)
def test_what_does_not_fit_the_model(entries, line):
    (got,) = misfits(Plan(layers=entries))
    assert line in got
    assert '"blocks.0.up"' in got


def test_a_plan_for_another_model():
    plan = uniform(0.5, model=ModelFacts(name="other", parameters=1, fingerprint="sha256:aaaa"))
    plan.check(LAYERS, fingerprint="sha256:aaaa")
    (got,) = misfits(plan, fingerprint="sha256:bbbb")
    assert 'made for "other" (sha256:aaaa…)' in got
    assert "0 of the plan's 4 entries are not in it" in got


def test_entries_may_name_blocks_and_what_holds_layers():
    Plan(
        layers={
            "blocks.0": {"drop": True},
            "blocks": {"train": {"rate": 0.5}},
            "blocks.1": {"cache": {"key_bits": 8, "value_bits": 4}},
        }
    ).check(LAYERS, blocks=BLOCKS)


def test_zeros_are_whole_units():
    layer = Sized("w", 6, 4, matrices=2)  # 48 weights
    prune = {
        "unstructured": (0.3, 14),  # round(14.4)
        "row": (0.3, 16),  # round(3.6) rows of 4
        "column": (0.3, 12),  # round(2.4) columns of 6
        "block(3x2)": (0.3, 12),  # round(2.4) blocks of 6
        "1:4": (0.75, 36),
    }
    for pattern, (sparsity, zeros) in prune.items():
        plan = Plan(layers={"w": Prune(sparsity=sparsity, pattern=pattern)})
        assert plan.zeros([layer]) == {"w": zeros}, pattern
        assert plan.achieved_sparsity([layer]) == zeros / 48


def test_a_budget_that_the_layers_do_not_meet_says_by_how_much():
    uniform(0.5).check(LAYERS)
    edited = uniform(0.5).model_copy(
        update={"layers": {**uniform(0.5).layers, "blocks.0.up": Treatments(prune=Prune(sparsity=0.7))}}
    )
    (got,) = misfits(edited)
    assert got == (
        "plan: budget.sparsity 0.5 is 400 zeros of 800, the layers give 460 (0.575000)."
        " Rebalance the layers, or set budget.sparsity to 0.575."
    )
    edited.model_copy(update={"budget": Budget(sparsity=0.575)}).check(LAYERS)


def test_n_of_m_layers_count_for_the_budget_too():
    layers = [Sized("a", 4, 4), Sized("b", 4, 4)]
    entries = {"a": Prune(sparsity=0.5, pattern="2:4"), "b": Prune(sparsity=0.0)}
    with pytest.raises(PlanError, match=r"the layers give 8 \(0\.250000\)"):
        Plan(budget=Budget(sparsity=0.5), layers=entries).check(layers)


def test_rebalance_worked_by_hand():
    """up of block 0 raised to 0.7 (210 of 300): 400 - 210 = 190 zeros for the other 500 weights, 0.38 each."""
    plan = uniform(0.5).model_copy(
        update={"layers": {**uniform(0.5).layers, "blocks.0.up": Treatments(prune=Prune(sparsity=0.7))}}
    )
    new = plan.rebalance(LAYERS, keep=["*.0.up"])
    assert new.zeros(LAYERS) == {"blocks.0.q": 38, "blocks.0.up": 210, "blocks.1.q": 38, "blocks.1.up": 114}
    assert new.budget.achieved == 0.5
    assert new.layers["blocks.0.up"] == plan.layers["blocks.0.up"]
    new.check(LAYERS)


def test_rebalance_leaves_fixed_patterns_and_other_treatments():
    layers = [Sized("a", 4, 4), Sized("b", 4, 4), Sized("c", 4, 4)]
    entries = {
        "a": Prune(sparsity=0.5, pattern="2:4"),
        "b": {"prune": {"sparsity": 0.1}, "quantize": {"bits": 4, "group": 4}},
    }
    plan = Plan(budget=Budget(sparsity=0.6), layers={**entries, "c": Quantize(bits=4, group=4)})
    new = plan.rebalance(layers)
    assert new.layers["a"] == plan.layers["a"]
    assert new.layers["b"].quantize == plan.layers["b"].quantize
    assert new.zeros(layers) == {"a": 8, "b": 11}  # round(0.6 * 32) = 19


def test_rebalance_refusals():
    with pytest.raises(SelectionError, match=r'"\*k_proj" matches none of the 4 layers'):
        uniform(0.5).rebalance(LAYERS, keep=["*k_proj"])
    with pytest.raises(BudgetError, match=r"no budget.sparsity"):
        Plan(layers={"blocks.0.q": Prune(sparsity=0.5)}).rebalance(LAYERS)
    plan = uniform(0.5).model_copy(update={"budget": Budget(sparsity=0.9)})
    with pytest.raises(
        BudgetError, match=r"0\.9 cannot be met: with 2 of 4 layers fixed, 0\.375000 to 0\.625000 is feasible"
    ):
        plan.rebalance(LAYERS, keep=["*.up"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), fractions), min_size=1, max_size=8), st.data())
def test_shift_is_exact_even_and_within_bounds(layers, data):
    sizes, sparsities = [size for size, _ in layers], [sparsity for _, sparsity in layers]
    zeros = data.draw(st.integers(0, sum(sizes)))
    counts = shift_evenly(sizes, sparsities, zeros)
    assert sum(counts) == zeros
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(round(count / size * size) == count for count, size in zip(counts, sizes, strict=True) if size)
    inside = [(c, n, s) for c, n, s in zip(counts, sizes, sparsities, strict=True) if 1 < c < n - 1]
    shifts = [(c / n - s, 2 / n) for c, n, s in inside]  # up to one weight of rounding each
    assert all(abs(a - b) <= one + two + 1e-9 for a, one in shifts for b, two in shifts)


def test_shift_refuses_what_does_not_fit():
    with pytest.raises(BudgetError, match="Ask for 0 to 3"):
        shift_evenly([1, 2], [0.5, 0.5], 4)


def test_diff_names_every_change():
    a = Plan(
        method={"name": "owl", "spread": 0.08},
        budget=Budget(sparsity=0.5),
        layers={"x": Prune(sparsity=0.5), "y": Prune(sparsity=0.5), "z": Quantize(bits=4)},
        scores={"x": 1.0},
    )
    b = Plan(
        method={"name": "owl", "spread": 0.1},
        budget=Budget(sparsity=0.6),
        solver={"name": "wanda"},
        layers={"x": Prune(sparsity=0.6), "y": Prune(sparsity=0.5), "w": {"drop": True}},
    )
    assert diff_plans(a, b) == [
        Change(None, "method.spread", 0.08, 0.1),
        Change(None, "budget.sparsity", 0.5, 0.6),
        Change(None, "solver.name", None, "wanda"),
        Change("x", "prune.sparsity", 0.5, 0.6),
        Change("z", "quantize.bits", 4, None),
        Change("z", "quantize.group", 128, None),
        Change("z", "quantize.symmetric", False, None),
        Change("w", "drop", None, True),
    ]
    assert diff_plans(a, a) == []
