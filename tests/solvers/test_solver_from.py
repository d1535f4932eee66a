import dataclasses

import pytest

from layerwise.errors import ConfigError
from layerwise.solvers import SOLVERS, Wanda, solver_from


@pytest.mark.parametrize("name", list(SOLVERS))
def test_settings_round_trip(name):
    solver = solver_from({"name": name})
    assert solver.name == name
    assert solver_from({"name": solver.name, **dataclasses.asdict(solver)}) == solver


def test_settings_are_taken():
    assert solver_from({"name": "wanda", "compare": "layer"}) == Wanda(compare="layer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "wnada"}, 'unknown solver "wnada". Did you mean "wanda"?'),
        ({}, 'unknown solver "None". Solvers: magnitude'),
        ({"name": ["wanda"]}, "unknown solver"),
        ({"name": "wanda", "compair": "row"}, 'solver wanda has no setting "compair". Did you mean "compare"?'),
        ({"name": "random", "seed": 1}, 'solver random has no setting "seed". It has none.'),
        ({"name": "wanda", "reference": 1}, "solver wanda: reference=1: give true or false."),
        ({"name": "wanda", "compare": "rows"}, 'Wanda.compare="rows"'),
    ],
)
def test_bad_settings_get_one_clear_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        solver_from(settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
