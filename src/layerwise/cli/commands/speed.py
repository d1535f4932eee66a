"""`layerwise speed`: the form in which a model runs fastest here, measured layer by layer."""

from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from ...errors import ModelError
from .. import options
from ..given import refuse
from ..inputs import ModelChoice
from ..screen import Screen, table
from ..settings import device_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def speed(
    context: typer.Context,
    model: options.Model,
    batch: options.PassBatch = 1,
    length: options.PassLength = 1,
    rounding: options.Rounding = False,
    exclude: options.StayDense = None,
    seconds: options.RaceSeconds = 0.2,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    remote_code: options.RemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """What zeros and bits buy in time here: try the forms that each layer could take, measure them, keep what is faster than dense.

    [dim]Example:[/]  layerwise speed out --batch 16

    [dim]Of a prompt instead of a step of decoding:[/]  layerwise speed out --length 512
    """
    screen = Screen(json=json, quiet=quiet)
    where = device_of(device)
    choice = ModelChoice(model, dtype, remote_code=remote_code)
    if choice.sees:
        refuse(context, "since images have no length in tokens", "length")
    else:
        _check_tokens(choice, length)
    inputs = _images(choice, batch) if choice.sees else None
    loaded = choice.load(screen)
    from ...io import armor_linears, packed_codes
    from ...runtime import fastest
    from ...runtime.report import HEAD, cells

    with screen.task("Timing") as step:
        _, report = fastest(
            loaded,
            None if inputs is None else inputs.to(_dtype(loaded)),
            batch=batch,
            length=length,
            device=where,
            codes=packed_codes(choice.folder),
            rounding=rounding,
            exclude=exclude or (),
            seconds=seconds,
            progress=step,
        )
    rows = table(*HEAD, left=4)
    rows.columns[-1].justify = "left"
    for layer in report.layers:
        rows.add_row(*(escape(cell) for cell in cells(layer)), style="" if layer.form == "dense" else "green")
    dense, now = report.bytes
    how = ", ".join(f"{name} {value}" for name, value in report.protocol.items())
    factored = len(armor_linears(loaded))
    screen.show(
        rows,
        f"\n{escape(report.summary())}",
        f"{factored} layers are in factors (ARMOR): they run as they are, and were not timed." if factored else "",
        f"Weights of these layers in memory: {now:,} bytes instead of {dense:,}." if now != dense else "",
        f"[dim]measured with: {escape(how)}[/]",
    )
    screen.show_json({"model": model, **report.to_dict()})


def _check_tokens(choice: ModelChoice, length: int) -> None:
    if choice.kind not in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        raise ModelError(
            f'model "{choice.name}" is of {choice.kind}, and what it takes is not known here. In Python: layerwise.fastest(model, inputs).'
        )
    choice.length(length)


def _images(choice: ModelChoice, batch: int) -> "Tensor":
    """(batch, channels, size, size), as config.json has them."""
    import torch

    size = choice.config.get("image_size")
    if not isinstance(size, int):
        raise ModelError(
            f'model "{choice.name}": its config.json has no image_size. In Python: layerwise.fastest(model, inputs).'
        )
    shape = batch, int(choice.config.get("num_channels", 3)), size, size
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _dtype(model: "torch.nn.Module") -> "torch.dtype":
    return next(one.dtype for one in model.parameters() if one.is_floating_point())
