"""Settings by name, on a toy table: what methods and solvers have in common."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from layerwise.errors import ConfigError
from layerwise.settings import build, nearest, pairs, words_of


@dataclass(frozen=True)
class Toaster:
    name: ClassVar[str] = "toaster"

    heat: float | None = None
    slices: int = 2
    side: Literal["one", "both"] = "both"
    defrost: bool = False


TOOLS = {"toaster": Toaster}


def test_values_in_their_type():
    assert build("tool", TOOLS, "toaster", {"heat": 3, "side": "one"}) == Toaster(heat=3.0, side="one")
    assert type(build("tool", TOOLS, "toaster", {"heat": 3}).heat) is float
    assert build("tool", TOOLS, "toaster", {"heat": None}).heat is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Taoster", {}, 'unknown tool "Taoster". Did you mean "toaster"? Tools: toaster.'),
        (None, {}, 'unknown tool "None". Tools: toaster.'),
        ("toaster", {"heta": 1}, 'no setting "heta". Did you mean "heat"? It has heat, slices, side, defrost.'),
        ("toaster", {"name": "x"}, 'no setting "name"'),  # a class variable is no setting
        ("toaster", {"slices": True}, "tool toaster: slices=True: give a whole number."),
        ("toaster", {"slices": 2.0}, "slices=2.0: give a whole number."),
        ("toaster", {"heat": "hot"}, "heat='hot': give a number."),
        ("toaster", {"defrost": 1}, "defrost=1: give true or false."),
    ],
)
def test_bad_requests_get_one_line(name, settings, message):
    with pytest.raises(ConfigError) as caught:
        build("tool", TOOLS, name, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_at_its_default_in_words_and_back():
    toaster = Toaster(heat=1e-5, side="one", defrost=True)
    assert words_of(toaster) == "heat=1e-05,side=one,defrost=true"
    assert build("tool", TOOLS, "toaster", pairs(words_of(toaster).split(","), "--set")) == toaster
    assert words_of(Toaster()) == ""


def test_what_is_given_stays_as_it_was():
    given = {"heat": 3}
    build("tool", TOOLS, "toaster", given)
    assert type(given["heat"]) is int


def test_nearest_ignores_case_and_keeps_the_known_spelling():
    assert nearest("lm_haed", ["lm_Head", "embed"]) == ' Did you mean "lm_Head"?'
    assert nearest("xyz", ["lm_Head"]) == ""
