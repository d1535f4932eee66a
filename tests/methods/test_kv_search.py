"""The search over pairs: its front against every choice there is, caps, storage that a kill does not end, workers, no global seeds."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import optuna
import pytest
import torch

from layerwise.errors import ConfigError, MissingExtra, OutputError
from layerwise.methods.kv_search import explore, opened, word
from layerwise.methods.kv_space import Space

PAIRS = ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
SPACE = Space(((0, 2), (1,), (3, 4), (5,)), (PAIRS, PAIRS[1:], PAIRS, PAIRS))  # 500 choices for six layers
WEIGHTS = (1.0, 5.0, 0.7, 2.0, 0.1, 3.0)


def bits(pairs):
    return sum(map(sum, pairs)) / 2 / len(pairs)


def loss(pairs):
    return sum(weight * 2.0 ** -sum(pair) for weight, pair in zip(WEIGHTS, pairs))


def best(cap, space=SPACE):
    every = [space.pairs(chosen) for chosen in product(*space.options)]
    return min(loss(pairs) for pairs in every if bits(pairs) <= cap)


@pytest.mark.parametrize("cap", [2.5, 3.1, 4, 6])
def test_the_front_holds_the_best_choice_of_the_cap_and_nothing_above_it(cap):
    found = explore(SPACE, bits, loss, cap, trials=150)
    assert all(bits(pairs) <= cap for pairs in found)
    assert all(value == loss(pairs) for pairs, value in found.items())
    assert len(found) < SPACE.size  # not by trying everything
    assert min(found.values()) == pytest.approx(best(cap))


def test_where_all_can_be_measured_all_are():
    space = Space(((0,), (1,)), (PAIRS, PAIRS))
    inside = {pairs for pairs in product(PAIRS, repeat=2) if bits(pairs) <= 4}
    assert len(inside) == 11
    assert explore(space, bits, loss, 4, trials=11).keys() == inside
    assert len(explore(space, bits, loss, 4, trials=10)) == 10


def test_what_is_always_measured_may_lie_above_the_cap_and_outside_the_space():
    uniform = [((keys, values),) * 6 for keys, values in ((8, 8), (2, 8))]
    assert SPACE.places(uniform[0]) == {"group0": 4, "group1": 3, "group2": 4, "group3": 4}
    assert SPACE.places(uniform[1]) is None
    assert SPACE.places(((2, 2), (4, 2), (4, 4), (2, 2), (2, 2), (2, 2))) is None  # layers 0 and 2 are one group
    first = SPACE.pairs(((4, 4), (4, 2), (2, 2), (2, 2)))
    found = explore(SPACE, bits, loss, 3, trials=4, first=[first], always=uniform)
    assert list(found)[:3] == [*uniform, first]
    assert len(found) == 4


def test_the_same_seed_finds_the_same_and_no_global_seed_is_touched():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    verbosity = optuna.logging.get_verbosity()
    first, again, other = (explore(SPACE, bits, loss, 4, trials=60, seed=seed) for seed in (0, 0, 1))
    assert list(first.items()) == list(again.items())
    assert list(first) != list(other)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert optuna.logging.get_verbosity() == verbosity


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_search_that_was_stopped_goes_on_and_ends_alike(tmp_path, kind):
    storage = tmp_path / "search.json" if kind == "journal" else f"sqlite:///{tmp_path}/search.db"
    trials = 12 if kind == "sqlite" else 40  # a database is slow
    measured = []

    def stops(pairs):
        if len(measured) == trials // 2:
            raise KeyboardInterrupt
        measured.append(pairs)
        return loss(pairs)

    with pytest.raises(KeyboardInterrupt):
        explore(SPACE, bits, stops, 4, trials=trials, storage=storage, key="a")
    more = []

    def counted(pairs):
        more.append(pairs)
        return loss(pairs)

    found = explore(SPACE, bits, counted, 4, trials=trials, storage=storage, key="a")
    assert len(more) == trials - trials // 2
    assert not set(more) & set(measured)
    assert set(measured) | set(more) == found.keys()
    assert (
        explore(SPACE, bits, stops, 4, trials=trials, storage=storage, key="a") == found
    )  # all known: nothing is measured
    with pytest.raises(KeyboardInterrupt):  # another question is another study
        explore(SPACE, bits, stops, 4, trials=trials, storage=storage, key="b")


def test_workers_share_one_search(tmp_path):
    measured = [[], []]

    def work(number):
        def counted(pairs):
            measured[number].append(pairs)
            time.sleep(0.02)
            return loss(pairs)

        return explore(SPACE, bits, counted, 4, trials=30, storage=tmp_path / "search.json")

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    assert all(30 <= len(one) <= 31 for one in found)  # both may be at their last one when the count is full
    assert all(measured)
    assert set(found[0]) == set(found[1]) or abs(len(found[0]) - len(found[1])) == 1


@pytest.mark.parametrize("trials", [30, 500])  # 500: every choice within the cap is listed, and measured
def test_what_another_worker_is_measuring_is_left_to_it_unless_it_seems_dead(tmp_path, monkeypatch, trials):
    storage = opened(tmp_path / "search.json")
    started = []

    def begin(pairs):  # what another worker does before it measures
        study = optuna.load_study(study_name="kvtuner-", storage=storage)
        study.enqueue_trial(SPACE.places(pairs))
        trial = study.ask()
        for group, options in enumerate(SPACE.options):
            trial.suggest_int(f"group{group}", 0, len(options) - 1)
        started.append(pairs)

    wanted = next(pairs for pairs in explore(SPACE, bits, loss, 4, trials=30) if loss(pairs) == best(4))

    def counted(pairs):
        if not started:
            begin(wanted)
            time.sleep(0.3)  # the longest trial so far
        return loss(pairs)

    monkeypatch.setattr("layerwise.methods.kv_search._PATIENCE", 1e9)
    found = explore(SPACE, bits, counted, 4, trials=trials, storage=storage)
    assert started == [wanted]
    assert len(found) >= 30
    assert wanted not in found
    monkeypatch.setattr("layerwise.methods.kv_search._PATIENCE", 0.0)
    found = explore(SPACE, bits, counted, 4, trials=trials + 20, storage=storage)
    assert wanted in found


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_kv_search import SPACE, bits, loss
from layerwise.methods.kv_search import explore
seen = []
def dies(pairs):
    seen.append(pairs)
    if len(seen) == 7:
        os._exit(9)
    return loss(pairs)
explore(SPACE, bits, dies, 4, trials=20, storage={storage!r})
"""


def test_a_process_that_was_killed_loses_only_what_it_was_at(tmp_path):
    from pathlib import Path

    storage = str(tmp_path / "search.json")
    code = KILLED.format(tests=str(Path(__file__).parent), storage=storage)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    more = []

    def counted(pairs):
        more.append(pairs)
        return loss(pairs)

    found = explore(SPACE, bits, counted, 4, trials=20, storage=storage)
    assert len(found) == 20
    assert len(more) == 14


def test_a_time_limit_ends_it_after_what_is_always_measured():
    uniform = [((2, 2),) * 6, ((8, 8),) * 6]
    assert list(explore(SPACE, bits, loss, 4, trials=50, always=uniform, minutes=1e-9)) == uniform


def test_a_loss_that_is_no_number_is_the_worst():
    found = explore(Space(((0,),), (PAIRS,)), bits, lambda pairs: float("nan") if pairs[0] == (4, 4) else 1.0, 8)
    assert max(found, key=found.get) == ((4, 4),)


def test_groups_must_cover_each_layer_once():
    for members in (((0,), (0, 1)), ((0,), (2,))):
        with pytest.raises(ConfigError, match="cover each layer once"):
            Space(members, (PAIRS, PAIRS))


def test_a_storage_that_is_none_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"search": 1,\n "tried": []}\n')
    with pytest.raises(ConfigError, match="no readable record of a search"):
        explore(SPACE, bits, loss, 4, trials=2, storage=tmp_path / "other.json")
    with pytest.raises(OutputError, match="cannot be used"):
        explore(SPACE, bits, loss, 4, trials=2, storage=tmp_path)
    with pytest.raises(ConfigError, match="no readable record"):
        explore(SPACE, bits, loss, 4, trials=2, storage="nosuch://x")


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"layerwise\[search\]"):
        explore(SPACE, bits, loss, 4, trials=2)


def test_words_are_read_back():
    from layerwise.methods.kv_search import _pairs_of

    assert word(((8, 4), (2, 2))) == "8-4 2-2"
    assert _pairs_of("8-4 2-2") == ((8, 4), (2, 2))
