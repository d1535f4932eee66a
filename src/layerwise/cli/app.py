"""The `layerwise` command: one Typer app, one file per command in `commands/`."""

from typing import Annotated

import typer

from .. import __version__
from .commands.compare import compare
from .commands.compress import compress
from .commands.demo import demo
from .commands.diff import diff
from .commands.evaluate import evaluate
from .commands.inspect import inspect
from .commands.methods import methods
from .commands.plan import plan
from .commands.recover import recover
from .commands.speed import speed

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layerwise {__version__}")
        raise typer.Exit


@app.callback()
def layerwise(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Decide how much to compress each layer of a neural network, do it, and prove what it cost.

    [dim]Try it offline, in a minute or two:[/]  layerwise demo
    """


LOOK, DO = "Look", "Do"
app.command(rich_help_panel=DO)(demo)
app.command(rich_help_panel=DO)(plan)
app.command(rich_help_panel=DO)(compress)
app.command(rich_help_panel=DO)(recover)
app.command(rich_help_panel=DO)(evaluate)
app.command(rich_help_panel=DO)(speed)
app.command(rich_help_panel=DO)(compare)
app.command(rich_help_panel=LOOK)(methods)
app.command(rich_help_panel=LOOK)(inspect)
app.command(rich_help_panel=LOOK)(diff)
