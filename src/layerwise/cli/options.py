"""The options that several commands share, with their help. One place, so that a word means the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

WHAT, HOW, DATA, RUN, OUTPUT = "What to compress", "How", "Data", "Run", "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub name such as HuggingFaceTB/SmolLM2-135M, or [bold]demo[/]: the model inside this package.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Only weights whose names match, e.g. '*.mlp.*' (repeatable).",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Leave out weights whose names match (repeatable).",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How the budget is shared over the layers: see [bold]layerwise methods[/].  [dim]default: uniform[/]",
        rich_help_panel=HOW,
        show_default=False,
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        help="Fraction of the chosen weights set to zero, 0 to 1.  [dim]default: the method's own[/]",
        rich_help_panel=HOW,
        show_default=False,
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="[bold]unstructured[/], or n:m such as 2:4: 2 kept of every 4 inputs.  [dim]default: unstructured[/]",
        rich_help_panel=HOW,
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method, e.g. spread=0.1 (repeatable).",
        rich_help_panel=HOW,
        show_default=False,
    ),
]
MinSparsity = Annotated[
    float | None,
    typer.Option(metavar="S", help="No layer below this.", rich_help_panel=HOW, show_default=False),
]
MaxSparsity = Annotated[
    float | None,
    typer.Option(metavar="S", help="No layer above this.", rich_help_panel=HOW, show_default=False),
]
Solver = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What computes the new weights: magnitude, random, wanda, sparsegpt.  [dim]default: wanda[/]",
        rich_help_panel=HOW,
        show_default=False,
    ),
]
SolverSet = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="A setting of the solver, e.g. damp=0.1 (repeatable).",
        rich_help_panel=HOW,
        show_default=False,
    ),
]
Propagate = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        help="Later blocks are measured on the outputs of [bold]compressed[/] blocks, or of [bold]dense[/] ones"
        " (one pass, faster, a little worse).",
        rich_help_panel=HOW,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="A .txt, .jsonl or .parquet file, hub:NAME[:CONFIG[:SPLIT]], or [bold]python-docs[/]: the standard library of this"
        " Python.  [dim]default for demo: python-docs[/]",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(metavar="N", help="Windows of text that are drawn.", rich_help_panel=DATA)]
Length = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens in a window.  [dim]default: the model's longest, at most 2048[/]",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Windows in one forward pass.  [dim]default: 1; of images 32[/]",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of everything that is drawn.", rich_help_panel=DATA)]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps, or auto: cuda where there is one. The whole model goes there if it fits, else block by block.",
        rich_help_panel=RUN,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.", rich_help_panel=RUN),
]
RemoteCode = Annotated[
    bool,
    typer.Option("--remote-code", help="Run the Python code that comes with the model.", rich_help_panel=RUN),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results and errors only, no progress.", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.", rich_help_panel=OUTPUT)]
Out = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FOLDER", help="Folder to write.", rich_help_panel=OUTPUT, show_default=False
    ),
]
