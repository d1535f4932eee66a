"""Schedules and slices in worked numbers (Adapt-Pruner, check 7)."""

import pytest

from layerwise.recover.rates import cosine, slices, wsd


def test_warm_up_stable_decay():
    rates = [2e-5 * wsd(u / 1000) for u in (0, 25, 50, 500, 900, 950, 1000)]
    assert rates == pytest.approx([0, 1e-5, 2e-5, 2e-5, 2e-5, 1.1e-5, 2e-6], abs=1e-12)


def test_cosine():
    assert [cosine(done) for done in (0, 0.025, 0.05, 1)] == pytest.approx([0, 0.5, 1, 0.1])


def test_later_stages_see_more():
    found = slices(7_714_363, 20)
    assert found[:3] == [36735, 73470, 110205]
    assert found[-1] == 734710
    assert sum(found) == 7_714_363
    assert slices(5, 1) == [5]
