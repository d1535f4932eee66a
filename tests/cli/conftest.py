"""What the tests of the command line share: a folder with a tiny model and a text, and no check in a fresh process."""

import shutil

import pytest

from layerwise.cli import screen
from layerwise.io import verify
from tiny import tiny_llama, tiny_text


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_llama(folder / "model")
    tiny_text(folder / "text.txt")
    return folder


@pytest.fixture
def here(source, tmp_path, monkeypatch):
    """The working folder, with a model and a text that may be spoilt."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen, "SOON", 1e9)  # no lines about progress, however slow this machine is today
    return tmp_path


@pytest.fixture
def same_process(monkeypatch):
    """The check in a fresh process is tested in tests/io; here it would take seconds for each command."""
    found = verify.Verified("transformers.AutoModelForCausalLM", 1, ("logits",), 0.0)
    monkeypatch.setattr(verify, "verify", lambda *args, **kwargs: found)
