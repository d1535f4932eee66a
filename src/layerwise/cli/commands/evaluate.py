"""`layerwise evaluate`: what a compressed model lost, beside the dense one."""

import math
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from .. import options
from ..given import refuse
from ..inputs import DataChoice, ModelChoice, environment_line, protocol_line
from ..screen import Screen, table
from ..settings import convention_of, device_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...evaluate import ZeroCount
    from ...tasks import Batches


def evaluate(
    context: typer.Context,
    model: options.Model,
    against: options.Against = None,
    data: options.Data = None,
    length: options.Length = None,
    tokens: options.Tokens = None,
    convention: options.Convention = "standard",
    latency: options.Latency = False,
    batch: options.Batch = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    remote_code: options.RemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Perplexity on a text, and how far the model has moved from the dense one; zeros and bytes from its files.

    [dim]Example:[/]  layerwise evaluate out --against demo
    """
    from ...evaluate import count_zeros
    from ...evaluate import evaluate as measure

    screen = Screen(json=json, quiet=quiet)
    where, known = device_of(device), convention_of(convention)
    choices = {"model": ModelChoice(model, dtype, remote_code=remote_code)}
    if against is not None:
        choices["dense"] = ModelChoice(against, dtype, remote_code=remote_code)
    if choices["model"].sees:
        refuse(
            context, "since an image classifier is judged by its accuracy", "length", "tokens", "convention", "latency"
        )
    source = data or ("python-docs" if "demo" in (model, against) else None)
    for choice in choices.values():
        _ = choice.bytes  # a damaged file shows before anything is loaded
        if not choice.sees:  # image classifiers are judged by their accuracy
            choice.check_perplexity()
    windows = DataChoice(source, length=length, batch=batch).read(
        choices["model"], screen, tokens, tail=convention == "all"
    )
    models = {name: choice.load(screen) for name, choice in choices.items()}
    if choices["model"].sees:
        _classifier(choices, models, windows, where, screen)
        return
    with screen.task("Evaluating") as step:
        found = measure(
            models["model"],
            windows,
            against=models.get("dense"),
            convention=known,
            device=where,
            progress=step,
        )
    files = {name: count_zeros(choice.folder) for name, choice in choices.items()}
    times = {name: _latency(one.to(where), screen, name) for name, one in models.items()} if latency else {}
    rows = table(
        "", "perplexity", "KL (nats)", "top-1 same", "zeros", "bytes", *(("prefill ms", "ms/token") if times else ())
    )
    figures = {"model": (found.perplexity, found.kl, found.top1), "dense": (found.dense_perplexity, 0.0, 1.0)}
    for name, choice in reversed(choices.items()):
        perplexity, kl, top1 = figures[name]
        rows.add_row(
            choice.name,
            f"{perplexity:.3f}",
            "–" if kl is None else f"{kl:.4f}",
            "–" if top1 is None else f"{top1:.2%}",
            f"{_share(files[name]):.2%}",
            f"{files[name].bytes:,}",
            *((f"{times[name]['prefill_ms']:.1f}", f"{times[name]['decode_ms']:.2f}") if times else ()),
        )
    screen.show(
        rows,
        f"\n[dim]measured on: {escape(protocol_line(windows))}; {found.tokens:,} tokens scored[/]",
        f"[dim]with: {environment_line(found.protocol)}[/]",
    )
    screen.show_json(
        {
            **found.to_dict(),
            "files": {name: {"zeros": one.total, "bytes": one.bytes} for name, one in files.items()},
            "latency": times or None,
        }
    )


def _classifier(
    choices: "dict[str, ModelChoice]",
    models: "dict[str, nn.Module]",
    pictures: "Batches",
    device: "torch.device",
    screen: Screen,
) -> None:
    """Accuracy instead of perplexity, agreement with the dense model's choice instead of divergence."""
    from ...evaluate import accuracy, count_zeros

    with screen.task("Evaluating") as step:
        found = accuracy(models["model"], pictures, against=models.get("dense"), device=device, progress=step)
        dense = accuracy(models["dense"], pictures, device=device) if "dense" in models else None
    files = {name: count_zeros(choice.folder) for name, choice in choices.items()}
    rows = table("", "accuracy", "same choice", "zeros", "bytes")
    figures = {"model": (found.top1, found.agreement), "dense": (dense.top1 if dense else 0.0, 1.0)}
    for name, choice in reversed(choices.items()):
        right, same = figures[name]
        agreement = "–" if same is None else f"{same:.2%}"
        rows.add_row(choice.name, f"{right:.2%}", agreement, f"{_share(files[name]):.2%}", f"{files[name].bytes:,}")
    screen.show(rows, f"\n[dim]measured on: {escape(protocol_line(pictures))}[/]")
    screen.show_json(
        {
            **found.to_dict(),
            "dense_top1": dense.top1 if dense else None,
            "files": {name: {"zeros": one.total, "bytes": one.bytes} for name, one in files.items()},
        }
    )


def _latency(model: "nn.Module", screen: Screen, name: str) -> dict[str, Any]:
    from ...evaluate import latency
    from ...evaluate.logits import context_of

    limit = context_of(model) or 2048
    with screen.task(f"Timing {name}"):
        return latency(model, prompt=min(2048, limit), context=min(128, limit // 2), new=min(128, limit // 2)).to_dict()


def _share(counted: "ZeroCount") -> float:
    """Zeros over values of all matrices of a saved model."""
    sizes = {name: math.prod(shape) for name, shape in counted.shapes.items() if len(shape) > 1}
    return sum(counted.zeros[name] for name in sizes) / max(1, sum(sizes.values()))
