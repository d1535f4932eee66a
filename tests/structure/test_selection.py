"""Which layers are up for compression: include, exclude, tied names, and patterns that match nothing."""

import pytest

from layerwise.errors import SelectionError
from layerwise.structure import structure_of
from models import MODELS

DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def names(model, **patterns):
    return [layer.name for layer in structure_of(model, **patterns)]


@pytest.fixture(scope="module")
def llama():
    return MODELS["llama"]()


@pytest.fixture(scope="module")
def tied():
    return MODELS["qwen2"]()


def test_include_chooses_exactly_what_matches(llama):
    assert names(llama, include=["*.down_proj"]) == DOWN
    assert names(llama, include=["*.down_proj", "lm_head"]) == [*DOWN, "lm_head"]
    assert names(llama, include=["*.down_proj.weight"]) == DOWN


def test_what_is_not_included_is_left_out_with_the_reason(llama):
    structure = structure_of(llama, include=["*.down_proj"])
    assert len(structure.left_out) == 12
    assert {reason for _, reason in structure.left_out} == {"not included"}


def test_exclude_removes(llama):
    structure = structure_of(llama, exclude=["*.layers.0.*", "*.q_proj"])
    assert structure.blocks[0].layers == ()
    assert [layer.role for layer in structure.blocks[1].layers] == ["k", "v", "o", "gate", "up", "down"]
    reasons = {layer.name: reason for layer, reason in structure.left_out}
    assert reasons["model.layers.0.self_attn.q_proj"] == 'excluded by "*.layers.0.*"'
    assert reasons["model.layers.1.self_attn.q_proj"] == 'excluded by "*.q_proj"'


def test_exclude_takes_from_what_include_chose(llama):
    assert names(llama, include=["*.down_proj", "lm_head"], exclude=["*.1.*"]) == [DOWN[0], "lm_head"]


def test_excluding_what_was_never_in_is_no_error(llama):
    assert names(llama, exclude=["lm_head"]) == names(llama)


def test_broad_patterns_pass_norms_and_position_tables_by(llama):
    assert [layer.role for layer in structure_of(llama, include=["model.layers.0.*"])] == "q k v o gate up down".split()
    everything = structure_of(MODELS["t5"](), include=["*"])
    assert {layer.role for layer in everything.outside} == {"embedding"}
    assert not any(layer.role in ("norm", "position") for layer in everything)


def test_norms_and_position_tables_have_patterns_of_their_own(llama):
    assert names(llama, include=["model.layers.1*norm"]) == [
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    ]
    (first, _) = structure_of(MODELS["t5"](), include=["*relative_attention_bias"])
    assert (first.kind, first.role, first.block) == ("embedding", "position", "encoder.block.0")


def test_a_tied_embedding_and_head_count_once(tied):
    outside = structure_of(tied, include=["*"]).outside
    assert [(layer.name, layer.kind, layer.tied) for layer in outside] == [
        ("model.embed_tokens", "embedding", ("lm_head.weight",))
    ]


def test_a_tied_head_can_be_asked_for_by_its_own_name(tied):
    (head,) = structure_of(tied, include=["lm_head"]).outside
    assert (head.name, head.kind, head.role, head.tied) == (
        "lm_head",
        "linear",
        "head",
        ("model.embed_tokens.weight",),
    )


@pytest.mark.parametrize("where", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("model.layers.0.mlp.down_prj", 'The nearest name is "model.layers.0.mlp.down_proj".'),
        ("*q_porj", "q_proj"),
        ("model.layers.1", 'Did you mean "model.layers.1.*"?'),
        ("LM_HEAD", "The nearest name is"),
    ],
)
def test_a_pattern_that_matches_nothing_names_itself_and_the_nearest(llama, where, pattern, hint):
    with pytest.raises(SelectionError) as error:
        structure_of(llama, **{where: ["*.down_proj", pattern]})
    assert f'"{pattern}"' in str(error.value)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
