"""`python-docs`: the running interpreter's own standard library as text, real data that every user already has.

Documents are the modules' sources (their docstrings are most of Python's reference) and the language reference that
`help()` prints (`pydoc_data.topics`). Left out: tests, `site-packages`, and `encodings` (tables of code points).
The modules in `HELD_OUT` are for evaluation alone: the embedded demo model never saw them and calibration never does.
Texts differ a little between Python versions, so perplexities compare only within one version.
"""

import os
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Literal

HELD_OUT = frozenset(
    "argparse calendar configparser csv difflib fractions heapq json shlex statistics textwrap zipfile".split()
)  # top-level modules or packages; each exists from Python 3.10 on

_SKIPPED_FOLDERS = frozenset("encodings site-packages dist-packages test tests idle_test __pycache__ _vendor".split())
_SKIPPED_FILES = ("_sysconfigdata", "topics.py")  # build settings of one machine; topics come parsed, below


def python_docs(split: Literal["calibration", "held-out"]) -> list[tuple[str, str]]:
    """(name, text) of every document of one split, in order of name.

    Raises FileNotFoundError if this interpreter carries its standard library without sources.
    """
    documents = [(name, text) for name, text in _sources() if (_module(name) in HELD_OUT) == (split == "held-out")]
    if not documents:
        raise FileNotFoundError("python-docs: this interpreter has no library sources. Give a text file as data.")
    if split == "calibration":
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        documents += [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    return documents


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_modules(root), key=lambda path: path.relative_to(root).as_posix()):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def _modules(root: Path) -> Iterator[Path]:
    # os.walk, not rglob: site-packages is left out before it is entered, and can be larger than all the rest
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS]
        yield from (
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(_SKIPPED_FILES)
        )


def _module(name: str) -> str:
    """ "json/decoder.py" -> "json", "csv.py" -> "csv"."""
    return name.split("/")[0].removesuffix(".py")
