"""A lock that one process has at a time, and that ends with it."""

import signal
import subprocess
import sys

import pytest

from layerwise.engine.lock import FileLock

HOLD = """
import pathlib, sys, time
from layerwise.engine.lock import FileLock
lock = FileLock(pathlib.Path(sys.argv[1]))
print(lock.take(), flush=True)
time.sleep(60)
"""


def test_only_one_holder_and_the_file_goes_with_it(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.take()
    assert not second.take()
    second.release()  # not its own: nothing happens
    assert (tmp_path / "lock").exists()
    first.release()
    assert not (tmp_path / "lock").exists()
    assert second.take()
    second.release()


def test_a_killed_holder_leaves_a_file_that_locks_nobody_out(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    lock = FileLock(path)
    assert not lock.take()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert path.exists()
    assert lock.take()
    lock.release()


def test_a_file_removed_between_opening_and_locking_is_no_lock(tmp_path, monkeypatch):
    path, before = tmp_path / "lock", FileLock(tmp_path / "lock")
    assert before.take()
    names, seen = FileLock._names, []

    def late(self, file):
        seen.append(names(self, file))
        return seen[-1]

    take = sys.modules["layerwise.engine.lock"]._lock

    def released_just_now(file):
        before.release()
        take(file)

    monkeypatch.setattr("layerwise.engine.lock._lock", released_just_now)
    monkeypatch.setattr(FileLock, "_names", late)
    after = FileLock(path)
    assert after.take()
    assert seen == [False, True]  # the first file had no name any more
    monkeypatch.setattr("layerwise.engine.lock._lock", take)
    assert not FileLock(path).take()
    after.release()


def test_a_disk_without_locks_is_an_error_of_the_system(tmp_path, monkeypatch):
    def none(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("layerwise.engine.lock._lock", none)
    with pytest.raises(OSError, match="not supported"):
        FileLock(tmp_path / "lock").take()
