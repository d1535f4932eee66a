import pytest

from layerwise.errors import ConfigError
from layerwise.methods import OWL, RandomRatios, Uniform, method_from


def test_settings_are_taken():
    assert method_from("owl", sparsity=0.6, spread=0.1) == OWL(sparsity=0.6, spread=0.1)
    assert method_from("random", seed=7) == RandomRatios(seed=7)
    assert method_from("uniform", pattern="2:4") == Uniform(pattern="2:4")


def test_a_whole_number_will_do_for_a_number():
    factor = method_from("owl", outlier_factor=3).outlier_factor
    assert factor == 3
    assert type(factor) is float
    assert method_from("uniform", sparsity=0).sparsity == 0.0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("erkk", {}, 'unknown method "erkk". Did you mean "erk"? Methods: uniform, uniform-plus,'),
        ("OWL", {}, 'Did you mean "owl"?'),
        ("wanda", {}, '"wanda" is a solver, which computes the weights;'),
        ("", {}, 'unknown method "". Methods: uniform'),
        ("owl", {"sprad": 0.1}, 'method owl has no setting "sprad". Did you mean "spread"? It has sparsity,'),
        ("er", {"power": 2.0}, 'method er has no setting "power". It has sparsity, min_sparsity, max_sparsity.'),
        ("owl", {"sparsity": "0.7"}, "method owl: sparsity='0.7': give a number."),
        ("owl", {"sparsity": True}, "method owl: sparsity=True: give a number."),
        ("random", {"seed": 0.5}, "method random: seed=0.5: give a whole number."),
        ("uniform", {"pattern": 24}, "method uniform: pattern=24: give text."),
    ],
)
def test_bad_requests_get_one_clear_line(name, settings, message):
    with pytest.raises(ConfigError) as caught:
        method_from(name, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
