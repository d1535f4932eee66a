"""Options of `layerwise compress` and `plan` for widths, depth, and what is tuned or trained along; shared ones are in `options.py`."""

from typing import Annotated

from .options import HOW, OUTPUT, _option

Parameters = Annotated[
    float | None,
    _option(
        HOW,
        "P",
        "Of methods that cut heads, channels or blocks: the share of the model's parameters that is kept, or their number."
        "  [dim]default: the method's own[/]",
    ),
]
Macs = Annotated[
    float | None,
    _option(HOW, "P", "Instead of --parameters: the share of the multiply-adds of a token that is kept."),
]
Latency = Annotated[
    float | None,
    _option(
        HOW,
        "P",
        "Instead of --parameters: the share of the time of a forward pass on this device that is kept, by a table measured first; the"
        " result is measured, too. Tokens in a pass: --set rows=N, 1 where nothing is said.",
    ),
]
UniformWidth = Annotated[
    bool,
    _option(
        HOW,
        None,
        "Of methods that cut heads or channels: one width for all blocks, never more parameters, for engines that take no other.",
        "--uniform-width",
    ),
]
MultipleOf = Annotated[
    int | None, _option(HOW, "N", "With --uniform-width: what the channels divide by.  [dim]default: 64[/]")
]
SaveAs = Annotated[
    str | None,
    _option(
        OUTPUT,
        "MODE",
        "Of widths that differ by layer: [bold]auto[/], for layerwise.load, or [bold]remote-code[/], with a small modelling file that loads"
        " without layerwise (trust_remote_code).  [dim]default: auto[/]",
    ),
]
RecoverMinutes = Annotated[
    float | None,
    _option(
        HOW,
        "M",
        "Of methods that cut heads, channels or blocks: train what is left for so many minutes on --data beside the dense model.",
    ),
]
Stages = Annotated[
    int | None,
    _option(
        HOW,
        "N",
        "With adapt-pruner and --recover-minutes: cut and train in so many stages in turn.  [dim]default: 1[/]",
    ),
]
Reconstruct = Annotated[
    bool,
    _option(
        HOW,
        None,
        "Tune each compressed block for a few epochs of the calibration data to give what the dense block gave; zeros, codes and patterns"
        " stay.",
        "--reconstruct",
    ),
]
ReconstructSet = Annotated[
    list[str] | None,
    _option(
        HOW,
        "NAME=VALUE",
        "With --reconstruct: epochs, lr, ratio_lr (of scales), target (dense, same), held_out, patience (repeatable).",
    ),
]
