"""Files that appear whole or not at all, also after a power cut: written under a name beside the target, put on disk, then renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name to write to: what is there when the block ends becomes `path`; if the block raises, nothing stays. The folders above are
    made. Raises what the system says, an OSError."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        into_place(partial, path)
    except BaseException:  # also when interrupted
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """`whole_file` for what the user asked for by name. Raises OutputError where the system refuses."""
    try:
        with whole_file(path) as partial:
            yield partial
    except OSError as error:
        raise OutputError(f'output "{path}" cannot be written: {error.strerror or error}.') from error


def into_place(partial: Path, path: Path) -> None:
    """Only a file whose bytes are on the disk gets its name."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
