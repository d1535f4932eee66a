"""The method that stands where none is asked for: the plainest for the budget that is given."""

import pytest

from layerwise.cli.settings import MethodChoice


@pytest.mark.parametrize(
    ("given", "name", "treatment"),
    [
        ({}, "uniform", "prune"),
        ({"sparsity": 0.5}, "uniform", "prune"),
        ({"bits": 3.0}, "uniform-bits", "quantize"),
        ({"bits": 3.0, "name": "lwq"}, "lwq", "quantize"),
        ({"parameters": 0.7}, "adapt-pruner", "prune"),
        ({"macs": 0.7}, "adapt-pruner", "prune"),
        ({"latency": 0.7, "name": "flap"}, "flap", "prune"),
    ],
)
def test_the_method_where_none_is_given(given, name, treatment):
    choice = MethodChoice(**given)
    assert choice.chosen == choice.build().name == name
    assert choice.treatment == treatment
    assert choice.narrows == any(one in given for one in ("parameters", "macs", "latency"))
