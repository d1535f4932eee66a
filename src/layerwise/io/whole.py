"""Outputs that appear whole or not at all: written under a name beside the target, put on disk, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError, SaveError


def check_output(folder: str | Path, *, force: bool = False, needed: int = 0) -> Path:
    """The target as a path, if it can be written: call it before a long run. Creates nothing.

    needed: bytes that will be written. Raises OutputError: it exists (without force), it is no model folder (with force),
    its parent cannot be written, or the disk has too little room.
    """
    target = Path(folder).expanduser().absolute()
    if not target.name:
        raise OutputError(f'output "{folder}": give the name of a new folder.')
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not force:
            raise OutputError(
                f'output "{folder}" exists already. Give another name, or replace it: force=True (--force).'
            )
        if not target.is_dir() or not _is_model(target):
            raise OutputError(
                f'output "{folder}" exists and is not a model folder, so it is not replaced. Remove it yourself.'
            )
    parent = next(p for p in target.parents if p.exists())  # the root exists
    if not parent.is_dir():
        raise OutputError(f'output "{folder}": {parent} is a file. Give a folder in a place that can be written.')
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f'output "{folder}": {parent} cannot be written. Give a folder elsewhere, or change its permissions.'
        )
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OutputError(
            f'output "{folder}" needs about {readable_size(needed)}, {parent} has {readable_size(free)} free.'
            f" Free {readable_size(needed - free)} or give a folder on another disk."
        )
    return target


@contextmanager
def whole_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A new folder beside `target` to write into; it becomes `target` when the block ends, and is removed if it raises.

    With `force`, what was at `target` is removed only after the new folder is complete. Raises OutputError if the place cannot
    be written, SaveError if the disk fills up on the way.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a dead process that had this number
        partial.mkdir()
    except OSError as error:
        raise OutputError(f'output "{target}" cannot be made: {error.strerror}. Give a folder elsewhere.') from error
    try:
        yield partial
        _as_other_files(partial)
        _to_disk(partial)
        _replace(partial, target, force)
    except BaseException as error:  # also when interrupted: nothing half written stays
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            free = shutil.disk_usage(target.parent).free
            raise SaveError(
                f'output "{target}": the disk filled up while writing ({readable_size(free)} free now that the part was removed).'
                " Free some room or give a folder on another disk."
            ) from error
        raise


def _is_model(folder: Path) -> bool:
    """A folder that may be replaced: one that `save` wrote, or one with weights. A config.json alone many other programs have too."""
    return (folder / "layerwise.json").is_file() or any(folder.glob("*.safetensors"))


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, or the user's quota, ended the writing. Safetensors says so in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def _as_other_files(folder: Path) -> None:
    """The permissions that a file gets by default: safetensors makes its files readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _to_disk(folder: Path) -> None:
    """Ask the system to write every file and the folder itself through to the disk, so that a power cut leaves no empty files."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(partial: Path, target: Path, force: bool) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if not force:
        try:
            target.rmdir()  # an empty folder may be filled; one that got contents meanwhile is not ours
        except OSError as error:
            raise OutputError(
                f'output "{target}" appeared while working. Give another name, or force=True (--force).'
            ) from error
        partial.rename(target)
        return
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def readable_size(count: int) -> str:
    """1234567 -> "1.2 MB" (powers of ten, as disks are sold)."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
