"""What the tests of saved folders share."""

import json
import subprocess
from pathlib import Path

import pytest

from layerwise.io import reload


@pytest.fixture
def in_this_process(monkeypatch):
    """The child's work without the child, whose cost is its start: a few tests pay it."""

    def run(command, **options):
        reload.reload(json.loads(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
