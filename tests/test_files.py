import errno
from pathlib import Path

import pytest

from layerwise.errors import OutputError
from layerwise.files import output_file, whole_file


def test_a_file_appears_when_it_is_whole_in_folders_that_are_made(tmp_path):
    path = tmp_path / "a/b/plan.yaml"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [True, False])
def test_what_fails_or_is_interrupted_leaves_the_file_from_before_and_nothing_else(tmp_path, error, begun):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(error), whole_file(path) as partial:
        if begun:
            partial.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_file_that_is_on_the_disk_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append((tmp_path / "a").exists()))
    with whole_file(tmp_path / "a") as partial:
        partial.write_text("x")
    assert synced == [False]


def test_a_full_disk_and_a_place_that_is_none_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    words = r'^output ".*file/plan\.yaml" cannot be written: [^\n]+\.$'
    with pytest.raises(OutputError, match=words), output_file(tmp_path / "file" / "plan.yaml"):
        pass

    def full(file, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    words = r"cannot be written: No space left on device\."
    with pytest.raises(OutputError, match=words), output_file(tmp_path / "plan.yaml") as partial:
        partial.write_text("x")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
