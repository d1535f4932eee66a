"""Clusters: the worked example beside scikit-learn's DBSCAN, noise, and each name once."""

import numpy as np
import pytest
from sklearn.cluster import DBSCAN

from layerwise.allocate import clusters, dbscan
from layerwise.errors import ConfigError

ROWS = [
    (0.01, 0.08, 0.21, 0.45, 0.96),
    (0.01, 0.09, 0.22, 0.46, 0.95),
    (0.01, 0.07, 0.20, 0.44, 0.93),
    (0.02, 0.12, 0.40, 0.60, 1.10),
    (0.02, 0.12, 0.41, 0.61, 1.12),
    (0.01, 0.05, 0.15, 0.30, 0.70),
    (0.03, 0.2, 0.7, 0.9, 1.5),
]
PAIRS = ("8-8", "8-4", "4-4", "4-2", "2-2")


def test_the_worked_example():
    assert dbscan(ROWS) == [0, 0, 0, 1, 1, -1, -1]
    errors = {f"l{index}": dict(zip(PAIRS, row)) for index, row in enumerate(ROWS)}
    assert clusters(errors) == [("l0", "l1", "l2"), ("l3", "l4"), ("l5",), ("l6",)]
    assert clusters(errors, noise="reference") == [("l0", "l1", "l2"), ("l3", "l4"), ("l5", "l6")]


@pytest.mark.parametrize("minimum", [1, 2, 3, 4])
def test_labels_are_those_of_scikit_learn(minimum):
    for seed in range(20):
        rows = np.random.default_rng(seed).uniform(size=(30, 2))
        rows[7] = rows[3]  # a duplicate
        assert dbscan(rows.tolist(), 0.12, minimum) == DBSCAN(eps=0.12, min_samples=minimum).fit(rows).labels_.tolist()


def test_only_layers_with_the_same_choices_share_a_group():
    errors = {"a": {1: 0.5, 2: 0.1}, "b": {1: 0.5}, "c": {2: 0.1, 1: 0.5}, "d": {1: 0.5}, "e": {3: 0.5}}
    assert clusters(errors) == [("a", "c"), ("b", "d"), ("e",)]
    assert clusters({}) == []


def test_an_unknown_rule_for_noise_is_refused():
    with pytest.raises(ConfigError, match="give own or reference"):
        clusters({"a": {1: 0.5}}, noise="pool")
