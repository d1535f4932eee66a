"""The race on a clock that the test turns: medians of paired rounds, whatever the machine does in between."""

import pytest

from layerwise.runtime import timing
from layerwise.runtime.timing import ROUNDS, Timed, race


class Machine:
    """Time passes only when work is done; `load` makes all of it slower."""

    def __init__(self, monkeypatch, load=lambda calls: 1.0):
        self.now, self.calls, self.load, self.order = 0.0, 0, load, []
        monkeypatch.setattr(timing, "_alone", lambda: True)
        monkeypatch.setattr(timing.time, "process_time", lambda: self.now)

    def way(self, name, seconds):
        def run():
            self.now += seconds * self.load(self.calls)
            self.calls += 1
            self.order.append(name)

        return run


def test_ratios_survive_a_machine_that_is_slow_half_of_the_time(monkeypatch):
    # every second hundred calls take three times as long
    machine = Machine(monkeypatch, load=lambda calls: 3.0 if calls // 100 % 2 else 1.0)
    found = race({"dense": machine.way("dense", 2e-4), "fast": machine.way("fast", 1e-4)}, seconds=0.1)
    assert found["fast"].ratio == pytest.approx(2, rel=0.35)
    assert found["fast"].faster()
    assert found["dense"].ratio == 1


def test_one_bad_round_does_not_decide(monkeypatch):
    timed = Timed(1.0, (0.1, *[1.2] * (ROUNDS - 1)))
    assert (timed.ratio, timed.low) == (1.2, 1.2)
    assert timed.faster()
    assert not Timed(1.0, (0.9, 0.9, 0.9, *[1.2] * 6)).faster()  # three of nine rounds slower: not sure enough
    assert not Timed(1.0, (1.04,) * 9).faster()  # below the margin
    assert Timed(1.0, (1.04,) * 9).faster(margin=0.03)


def test_ways_take_turns_and_the_hopeless_leave(monkeypatch):
    machine = Machine(monkeypatch)
    ways = {name: machine.way(name, cost) for name, cost in (("dense", 1.0), ("slow", 5.0), ("fast", 0.5))}
    found = race(ways, seconds=5)  # one call a turn
    assert len(found["slow"].ratios) == 2
    assert len(found["fast"].ratios) == len(found["dense"].ratios) == ROUNDS
    turns = machine.order[6:]  # after the first two calls of each
    assert turns[:6] == ["dense", "slow", "fast", "slow", "fast", "dense"]
    assert machine.order.count("slow") == 4
    stay = race(ways, seconds=5, to_the_end=True)
    assert len(stay["slow"].ratios) == ROUNDS


def test_dense_stays_however_slow(monkeypatch):
    machine = Machine(monkeypatch)
    found = race({"dense": machine.way("dense", 9.0), "fast": machine.way("fast", 1.0)}, seconds=5)
    assert found["fast"].ratio == 9
    assert len(found["dense"].ratios) == ROUNDS


def test_very_slow_calls_have_three_rounds(monkeypatch):
    machine = Machine(monkeypatch)
    found = race({"dense": machine.way("dense", 50.0), "fast": machine.way("fast", 40.0)}, seconds=1)
    assert len(found["fast"].ratios) == 3
    assert found["fast"].ratio == 1.25


def test_short_calls_are_timed_many_at_a_time_and_long_ones_once(monkeypatch):
    machine = Machine(monkeypatch)
    race({"dense": machine.way("dense", 1e-5), "long": machine.way("long", 1e-1)}, seconds=0.18, to_the_end=True)
    # a share is 10 ms: a thousand short calls a turn, one long one
    assert machine.order.count("dense") == pytest.approx(ROUNDS * 1000, rel=0.02)
    assert machine.order.count("long") == ROUNDS + 2


def test_other_memory_is_read_before_each_call_and_not_timed(monkeypatch):
    machine = Machine(monkeypatch)
    read = []

    class Memory:
        def sum(self):
            machine.now += 1e3
            read.append(machine.calls)

    monkeypatch.setattr(timing.torch, "ones", lambda size: Memory())
    found = race({"dense": machine.way("dense", 1e-3), "b": machine.way("b", 5e-4)}, seconds=0.1, others=1 << 20)
    assert found["dense"].ms == pytest.approx(1)
    assert found["b"].ratio == pytest.approx(2)
    assert read == sorted(set(read))  # once before every call but the first of each way
    assert len(read) == machine.calls - 2


def test_garbage_is_collected_again_afterwards(monkeypatch):
    import gc

    machine = Machine(monkeypatch)
    seen = []

    def run():
        seen.append(gc.isenabled())
        machine.now += 1

    race({"dense": run}, seconds=1e-3)
    assert not any(seen)
    assert gc.isenabled()
