"""Options that were given although nothing reads them: an error, since a run that ignores half of a request has not done it."""

import typer

from ..errors import ConfigError

CALIBRATION = ("data", "samples", "length", "batch")  # what draws the calibration data
SHARING = (
    "include",
    "exclude",
    "method",
    "sparsity",
    "pattern",
    "bits",
    "levels",
    "set_",
    "min_sparsity",
    "max_sparsity",
    "minutes",
    "storage",
)  # what makes a plan


def refuse(context: typer.Context, why: str, *names: str) -> None:
    """Raise ConfigError naming those of these parameters that the user gave: "--samples, --length: not used, WHY." """
    found = [
        max(one.opts, key=len)
        for one in context.command.params
        if one.name in names and (source := context.get_parameter_source(one.name)) and source.name == "COMMANDLINE"
    ]
    if found:
        raise ConfigError(f"{', '.join(found)}: not used, {why}. Leave {'it' if len(found) == 1 else 'them'} out.")
