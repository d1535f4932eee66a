"""Options of `layerwise recover` alone; shared ones are in `options.py`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DATA, HOW, OUTPUT, RUN, _option

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A compressed model: a folder that layerwise or another tool wrote.", show_default=False
    ),
]
Teacher = Annotated[
    str | None,
    _option(HOW, "MODEL", "The dense model, whose predictions are learnt beside the text.  [dim]default: none[/]"),
]
Minutes = Annotated[
    float | None, _option(HOW, "M", "Train for so many minutes.  [dim]default: 10, where --steps is not given[/]")
]
Steps = Annotated[int | None, _option(HOW, "N", "Train for so many steps: the same seed gives the same bits.")]
Lr = Annotated[
    float | None,
    _option(
        HOW, "R", "The highest learning rate, of AdamW.  [dim]default: 3e-4, of adapters 3e-3, of hira 1e-2[/]", "--lr"
    ),
]
Accumulate = Annotated[
    int,
    _option(HOW, "N", "Batches to one step of the optimiser: as a larger batch, in less memory.", show_default=True),
]
Alpha = Annotated[
    float, _option(HOW, "A", "With --teacher: its share of the loss; 1 needs no labels.", show_default=True)
]
Temperature = Annotated[
    float,
    _option(HOW, "T", "With --teacher: predictions are softened by this before they are compared.", show_default=True),
]
Hidden = Annotated[
    float,
    _option(HOW, "W", "With --teacher: weight of the relative errors of the blocks' outputs.", show_default=True),
]
AdapterKind = Annotated[
    str | None,
    _option(
        HOW,
        "KIND",
        "Train an adapter that leaves zeros zero, the model itself frozen: [bold]hira[/], [bold]shira[/] or [bold]masked-lora[/]. It is"
        " merged at the end; of a quantized model it is saved apart.",
        "--adapter",
    ),
]
Rank = Annotated[
    int,
    _option(
        HOW, "N", "With --adapter: its rank (of shira: entries, as many as that rank would have).", show_default=True
    ),
]
Patience = Annotated[
    int,
    _option(HOW, "N", "Stop after so many looks at the held-out text without a lower loss; there are ten in a run.", show_default=True),
]  # fmt: skip
Precision = Annotated[
    str,
    _option(RUN, "NAME", "Of the arithmetic: float32 or bfloat16. Weights are trained in float32.", show_default=True),
]
GradientCheckpointing = Annotated[
    bool,
    _option(RUN, None, "Compute activations again in the backward pass: less memory, a third more time.", "--gradient-checkpointing"),
]  # fmt: skip
Samples = Annotated[
    int, _option(DATA, "N", "Most windows (or images) to train on; fewer where the data has fewer.", show_default=True)
]
Batch = Annotated[int | None, _option(DATA, "N", "Windows in one forward pass.  [dim]default: 4, of images 32[/]")]
Length = Annotated[int | None, _option(DATA, "N", "Tokens in a window.  [dim]default: 512, or the model's longest[/]")]
HeldOut = Annotated[
    str | None,
    _option(
        DATA, "FILE",
        "What the model is judged by.  [dim]default: a sixteenth of --data that is not trained on; of python-docs its held-out modules[/]",
        "--held-out",
    ),
]  # fmt: skip
Out = Annotated[
    Path | None,
    _option(OUTPUT, "FOLDER", "Where the recovered model goes.  [dim]default: MODEL-recovered[/]", "--output", "-o"),
]
Plot = Annotated[Path | None, _option(OUTPUT, "FILE", "Draw the losses, a PNG.", "--plot")]
