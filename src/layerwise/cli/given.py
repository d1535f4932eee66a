"""Options that cannot be met, or that nothing reads: an error, since a run that ignores half of a request has not done it."""

from pathlib import Path

import typer

from ..errors import ConfigError, OutputError

CALIBRATION = ("data", "samples", "length", "batch")  # what draws the calibration data
SHARING = (
    "include",
    "exclude",
    "method",
    "sparsity",
    "parameters",
    "macs",
    "latency",
    "pattern",
    "bits",
    "levels",
    "set_",
    "min_sparsity",
    "max_sparsity",
    "minutes",
    "storage",
)  # what makes a plan


def refuse_existing(path: Path | None, force: bool) -> None:
    """Raise OutputError for a file that is there and may not be replaced."""
    if path is not None and path.exists() and not force:
        raise OutputError(f'output "{path}" exists already. Give another name, or replace it: --force.')


def check_png(path: Path | None, force: bool) -> None:
    """Raise OutputError unless a picture can be written under this name."""
    if path is not None and path.suffix.lower() != ".png":
        raise OutputError(f'output "{path}": give a name that ends in .png.')
    refuse_existing(path, force)


def refuse(context: typer.Context, why: str, *names: str) -> None:
    """Raise ConfigError naming those of these parameters that the user gave: "--samples, --length: not used, WHY." """
    found = [
        max(one.opts, key=len)
        for one in context.command.params
        if one.name in names and (source := context.get_parameter_source(one.name)) and source.name == "COMMANDLINE"
    ]
    if found:
        raise ConfigError(f"{', '.join(found)}: not used, {why}. Leave {'it' if len(found) == 1 else 'them'} out.")
