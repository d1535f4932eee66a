"""The habits of the project that no other tool holds: what importing costs, docstrings, README, version, size of files."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import layerwise

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "layerwise"
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES = 350
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def in_fresh_process(code: str) -> str:
    """Standard output of the code, run by this interpreter with nothing imported yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_no_heavy_library():
    code = "import sys; before = set(sys.modules); import layerwise; print(*sorted(set(sys.modules) - before))"
    loaded = in_fresh_process(code).split()
    assert "layerwise" in loaded
    heavy = {"torch", "transformers", "numpy", "pydantic", "safetensors", "typer", "rich", "matplotlib", "datasets"}
    assert not heavy & {name.split(".")[0] for name in loaded}


def test_importing_is_quick():
    code = "import time; start = time.perf_counter(); import layerwise; print(time.perf_counter() - start)"
    # the best of three: another process may hold the core for a moment
    assert min(float(in_fresh_process(code)) for _ in range(3)) < 0.2


def test_importing_everything_patches_and_seeds_nothing():
    """Every room but the command line: torch and transformers keep their own functions, settings and random state."""
    rooms = [path.parent.name for path in FILES if path.name == "__init__.py" and path.parent not in (SOURCE,)]
    rooms = [room for room in rooms if room not in ("cli", "commands")]
    code = f"""
import logging, random, sys, warnings
import numpy, torch, transformers
from transformers.models.llama import modeling_llama
def state():
    kept = {{
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "torch": torch.get_rng_state().tolist(), "python": random.getstate(), "numpy": repr(numpy.random.get_state()),
        "cuda": torch.cuda.is_initialized(), "filters": len(warnings.filters), "logging": logging.root.handlers[:],
        "hook": sys.excepthook,
    }}
    for owner in (torch.nn.Module, torch.nn.Linear, torch.Tensor, transformers.PreTrainedModel, modeling_llama.LlamaModel):
        kept |= {{(owner.__name__, name): id(value) for name, value in vars(owner).items() if callable(value)}}
    return kept
before = state()
import importlib, layerwise
for room in {sorted(rooms)}:
    importlib.import_module("layerwise." + room)
after = state()
print(*[key for key in before if before[key] != after.get(key)], *[key for key in after if key not in before])
"""
    assert in_fresh_process(code) == ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_every_module_says_what_it_is(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:  # an empty file has nothing to say
        assert ast.get_docstring(tree), f"{path} starts without a docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_file_outgrows_its_reader(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path.name} has {lines} lines: split it by what it knows"


def test_one_version_everywhere():
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert written
    assert layerwise.__version__ == written[1]
    assert metadata.version("layerwise") == written[1]
    assert f"## [{written[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(layerwise.__all__))
def test_every_name_of_the_package_is_there(name: str):
    assert getattr(layerwise, name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_in_the_pages_parses(page: Path):
    for block in re.findall(r"^```python.*?\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_readme_shows_python():
    assert "```python" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_contributing_shows_the_example_that_runs():
    shown = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
    runs = (ROOT / "examples" / "my_method.py").read_text(encoding="utf-8").splitlines()
    assert shown
    assert [line for line in "".join(shown).splitlines() if line not in runs] == []


def test_readme_names_every_method_and_solver():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in (*layerwise.methods.METHODS, *layerwise.solvers.SOLVERS) if f"`{name}`" not in page]
    assert missing == []
