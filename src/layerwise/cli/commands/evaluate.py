"""`layerwise evaluate`: what a compressed model lost, beside the dense one."""

import math
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from ...errors import ConfigError
from .. import kv_cache, options
from ..given import refuse
from ..inputs import DataChoice, ModelChoice, environment_line, hash_line, protocol_line
from ..screen import Screen, table
from ..settings import convention_of, device_of
from ..zero_shot import zero_shot

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...cache import QuantizedKVCache
    from ...evaluate import Latency, ZeroCount
    from ...evaluate.logits import Convention
    from ...tasks import Batches

TIMES = ("prefill ms", "ms/token", "KV bytes")


def evaluate(
    context: typer.Context,
    model: options.Model,
    against: options.Against = None,
    data: options.Data = None,
    length: options.Length = None,
    tokens: options.Tokens = None,
    bos: options.Bos = False,
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    convention: options.Convention = "standard",
    latency: options.Latency = False,
    kv_bits: options.KvBits = None,
    kv_mode: options.KvMode = "per-token",
    kv_group: options.KvGroup = None,
    plan: options.KvPlan = None,
    batch: options.Batch = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    remote_code: options.RemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Perplexity on a text, or accuracy in tasks, and how far the model has moved from the dense one; zeros and bytes of its files.

    [dim]Example:[/]  layerwise evaluate out --against demo

    [dim]Example:[/]  layerwise evaluate out --against demo --tasks examples/lm_eval/stdlib_modules.yaml

    [dim]Example:[/]  layerwise evaluate demo --kv-bits K8V4
    """
    screen = Screen(json=json, quiet=quiet)
    where, known = device_of(device), convention_of(convention)
    of_text = ("tokens", "bos", "convention", "latency", *kv_cache.OPTIONS)
    if tasks is not None:
        refuse(context, "since --tasks bring their own text", "data", *of_text)
    elif limit is not None:
        raise ConfigError("--limit goes with --tasks; of a text, --tokens N takes the first N tokens.")
    choices = {"model": ModelChoice(model, dtype, remote_code=remote_code)}
    if against is not None:
        choices["dense"] = ModelChoice(against, dtype, remote_code=remote_code)
    if choices["model"].sees:
        refuse(context, "since an image classifier is judged by its accuracy", "length", *of_text)
    for choice in choices.values():
        _ = choice.bytes  # a damaged file shows before anything is loaded
        if not choice.sees:
            choice.check_perplexity()
    cache = None
    if tasks is not None:
        kv_cache.say_unused(choices["model"], screen)
        zero_shot(choices, tasks, screen, limit=limit, batch=batch or 1, length=length, device=where)
        return
    if not choices["model"].sees:
        cache = kv_cache.cache_of(context, choices["model"], kv_bits, plan, kv_mode, kv_group)
    source = data or ("python-docs" if "demo" in (model, against) else None)
    windows = DataChoice(source, length=length, batch=batch, bos=bos).read(
        choices["model"], screen, tokens, tail=convention == "all"
    )
    models = {name: choice.load(screen) for name, choice in choices.items()}
    if choices["model"].sees:
        _classifier(choices, models, windows, where, screen)
    else:
        _language(choices, models, windows, screen, known, where, latency, cache)


def _language(
    choices: "dict[str, ModelChoice]",
    models: "dict[str, nn.Module]",
    windows: "Batches",
    screen: Screen,
    convention: "Convention",
    where: "torch.device",
    latency: bool,
    cache: "QuantizedKVCache | None",
) -> None:
    from ...evaluate import count_zeros
    from ...evaluate import evaluate as measure

    with screen.task("Evaluating") as step:
        found = measure(
            models["model"],
            windows,
            against=models.get("dense"),
            convention=convention,
            device=where,
            progress=step,
        )
    kv = kv_cache.with_cache(models, windows, cache, screen, convention, where) if cache is not None else None
    files = {name: count_zeros(choice.folder) for name, choice in choices.items()}
    times = {name: _latency(one.to(where), screen, name) for name, one in models.items()} if latency else {}
    rows = table(
        "",
        "perplexity",
        "KL (nats)",
        "top-1 same",
        "zeros",
        "bytes",
        *(TIMES if times else ()),
        *(kv_cache.COLUMNS if kv else ()),
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
            *(_times(times[name]) if times else ()),
            *(kv_cache.plain_cells(kv) if kv else ()),
        )
    if kv is not None and cache is not None:
        rows.add_row(
            f"  with {cache.name}",
            f"{kv.perplexity:.3f}",
            f"{kv.kl:.4f}",
            f"{kv.top1:.2%}",
            "",
            "",
            *("" for _ in (TIMES if times else ())),
            *kv_cache.cells(kv),
        )
    screen.show(
        rows,
        f"\n[dim]measured on: {escape(protocol_line(windows))}; {found.tokens:,} tokens scored[/]",
        *(f"[dim]{escape(line)}[/]" for line in (kv_cache.lines(kv, "dense" in models) if kv else [])),
        *([f"[dim]times: {_timed(times['model'])}[/]"] if times else []),
        f"[dim]with: {environment_line(found.protocol)}[/]",
        f"[dim]hashes: {hash_line(found.protocol)}[/]",
    )
    screen.show_json(
        {
            **found.to_dict(),
            "files": {name: {"zeros": one.total, "bytes": one.bytes} for name, one in files.items()},
            "latency": {name: one.to_dict() for name, one in times.items()} or None,
            "kv_cache": kv.to_dict() if kv else None,
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
    protocol = found.protocol | ({"dense_model": dense.protocol["model"]} if dense else {})
    screen.show(
        rows,
        f"\n[dim]measured on: {escape(protocol_line(pictures))}[/]",
        f"[dim]with: {environment_line(protocol)}[/]",
        f"[dim]hashes: {hash_line(protocol)}[/]",
    )
    screen.show_json(
        {
            **found.to_dict(),
            "protocol": protocol,
            "dense_top1": dense.top1 if dense else None,
            "files": {name: {"zeros": one.total, "bytes": one.bytes} for name, one in files.items()},
        }
    )


def _latency(model: "nn.Module", screen: Screen, name: str) -> "Latency":
    from ...evaluate import latency
    from ...evaluate.logits import context_of

    limit = context_of(model) or 2048
    with screen.task(f"Timing {name}"):
        return latency(model, prompt=min(2048, limit), context=min(128, limit // 2), new=min(128, limit // 2))


def _times(found: "Latency") -> tuple[str, ...]:
    prefill = f"{found.prefill_ms:.1f} ({found.prefill_iqr:.1f})"
    return prefill, f"{found.decode_ms:.2f} ({found.decode_iqr:.2f})", f"{found.kv_bytes:,}"


def _timed(found: "Latency") -> str:
    how = found.protocol
    threads = f"{how['threads']} thread{'' if how['threads'] == 1 else 's'}"
    return (
        f"median (interquartile range) at batch 1 on {threads}; prefill and KV cache of {how['prompt']} tokens,"
        f" {how['new']} tokens decoded after {how['context']}"
    )


def _share(counted: "ZeroCount") -> float:
    """Zeros over values of all matrices of a saved model."""
    sizes = {name: math.prod(shape) for name, shape in counted.shapes.items() if len(shape) > 1}
    return sum(counted.zeros[name] for name in sizes) / max(1, sum(sizes.values()))
