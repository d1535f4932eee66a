"""The quantised KV cache of `evaluate`: what was asked for, and its row of the table."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from ..errors import ConfigError
from .given import refuse
from .inputs import ModelChoice
from .screen import Screen

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..cache import QuantizedKVCache
    from ..evaluate import Evaluation
    from ..evaluate.logits import Convention
    from ..tasks import Batches
    from ..treatments import CacheMode

OPTIONS = ("kv_bits", "plan", "kv_mode", "kv_group")
COLUMNS = ("KV bits", "KV bytes/token")


def cache_of(
    context: typer.Context, model: ModelChoice, bits: str | None, plan: Path | None, mode: str, group: int | None
) -> "QuantizedKVCache | None":
    """What --kv-bits or --plan ask for, else what the plan in the model's folder says; None if that says nothing.

    Raises ConfigError, ModelError, PlanError, ShapeError: before any weight is read.
    """
    if bits is not None and plan is not None:
        raise ConfigError("--kv-bits and --plan both give the bits of the KV cache. Leave one out.")
    if bits is None:
        refuse(context, "since they go with --kv-bits", "kv_mode", "kv_group")

    from ..cache import QuantizedKVCache, parse_pair
    from ..io.kv_cache import cache_plan, config_of
    from ..plan import Plan

    if bits is not None:
        keys, values = parse_pair(bits)
        config = config_of(model.folder, model.remote_code)
        settings = {"mode": cast("CacheMode", mode), "group": group, "quantize_prefill": True}
        return QuantizedKVCache.uniform(keys, values, config, **settings)
    found = Plan.load(plan) if plan is not None else cache_plan(model.folder)
    if found is None:
        return None
    return QuantizedKVCache.from_plan(found, config_of(model.folder, model.remote_code), quantize_prefill=True)


def say_unused(model: ModelChoice, screen: Screen) -> None:
    """Tasks run with the plain cache, also where the plan beside the model has bits for it: then this is said."""
    from ..io.kv_cache import cache_plan

    if cache_plan(model.folder) is not None:
        screen.say(
            "note: tasks run with the plain KV cache, not with the bits that the model's plan gives it.", style="yellow"
        )


def with_cache(
    models: "dict[str, nn.Module]",
    windows: "Batches",
    cache: "QuantizedKVCache",
    screen: Screen,
    convention: "Convention",
    where: "torch.device",
) -> "Evaluation":
    """The compressed model with this cache, against the dense one; without one, against itself with the plain cache."""
    from ..evaluate import evaluate

    with screen.task(f"Evaluating with {cache.name}") as step:
        return evaluate(
            models["model"],
            windows,
            against=models.get("dense", models["model"]),
            convention=convention,
            device=where,
            progress=step,
            cache=cache,
        )


def cells(found: "Evaluation") -> tuple[str, ...]:
    """Of its own two columns."""
    assert found.cache is not None  # noqa: S101  (it was measured with one)
    return f"{found.cache.bits:.2f}", f"{found.cache.bytes_per_token:,.0f}"


def plain_cells(found: "Evaluation") -> tuple[str, ...]:
    """Of the rows with the plain cache, in 16 bits."""
    assert found.cache is not None  # noqa: S101
    return "16", f"{found.cache.plain_bytes:,.0f}"


def lines(found: "Evaluation", dense: bool) -> list[str]:
    """What the row means, for people."""
    assert found.cache is not None  # noqa: S101
    against = "the dense model" if dense else "the same model with the plain cache"
    return [
        "KV cache: every token attends to quantised keys and values; bits with scales and offsets, bytes of all layers that grow with"
        f" the text, plain ones in 16 bits; KL from {against}",
        *(f"KV cache: {note}" for note in found.cache.notes),
    ]
