"""Put the demo's real output and picture into README.md: run after anything that changes them.

    make readme

The part between the marks in README.md is replaced by what `layerwise demo` prints, and docs/images/demo-sparsities.png by its picture.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "images" / "demo-sparsities.png"
MARKS = re.compile(r"(<!-- demo:start -->\n).*?(<!-- demo:end -->)", re.DOTALL)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-m", "layerwise", "demo", "--quiet", "--output", "demo-out"]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        printed = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        shutil.copyfile(Path(folder) / "demo-out" / "sparsities.png", PICTURE)
    page = README.read_text(encoding="utf-8")
    block = f"```text\n$ layerwise demo --output demo-out\n{printed}\n```\n"
    README.write_text(MARKS.sub(lambda marks: f"{marks[1]}{block}{marks[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
