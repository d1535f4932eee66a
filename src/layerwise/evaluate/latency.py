"""Time of a language model at batch 1: prefill of a prompt, and each token decoded with the KV cache; and the bytes of that cache.

The two are reported apart: what makes one faster (fewer tokens in the prompt, say) may leave the other as it was.

`torch.utils.benchmark` warms up, synchronises, fixes the number of threads and repeats; median and interquartile range are reported.
Zeros in dense tensors change neither time nor memory: a faster number here comes from smaller shapes or a sparse kernel.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

from ..errors import ConfigError, ModelError
from ..tasks import undisturbed
from .logits import context_of
from .protocol import Protocol, environment_of

RUNS = 5  # about as many at least, however slow the model


@dataclass(frozen=True)
class Latency:
    """Milliseconds, median and interquartile range over `*_runs` runs; decode per token.

    kv_bytes: of all keys and values (or what else the model keeps) after a prompt of `protocol["prompt"]` tokens at batch 1.
    """

    prefill_ms: float
    prefill_iqr: float
    prefill_runs: int
    decode_ms: float
    decode_iqr: float
    decode_runs: int
    kv_bytes: int
    protocol: Protocol

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def latency(
    model: nn.Module,
    *,
    prompt: int = 2048,
    context: int = 128,
    new: int = 128,
    threads: int | None = None,
    seconds: float = 2.0,
) -> Latency:
    """Prefill of 1 x `prompt` tokens; decoding of `new` tokens after `context`, one by one. `seconds`: least time for each.

    Every decoding run starts from a copy of the context's cache; the copy is timed too (once per `new` tokens, well under 1 %).
    Raises ConfigError where the model's positions do not reach that far, ModelError for a model without a KV cache.
    """
    limit = context_of(model)
    if min(prompt, context, new) < 1 or (limit is not None and max(prompt, context + new) > limit):
        raise ConfigError(
            f"prompt={prompt}, context={context}, new={new}: this model has {limit or 'unlimited'} positions; "
            "prompt and context + new must be from 1 to that."
        )
    threads = torch.get_num_threads() if threads is None else threads
    with undisturbed([model]):
        device = next(model.parameters()).device
        ids = _ids(model, max(prompt, context + new)).to(device)
        kv_bytes = sum(one.numel() * one.element_size() for one in _tensors(_cache_of(model, ids[:, :prompt]), set()))
        prefill = _time(_Prefill(model, ids[:, :prompt]), threads, seconds)
        decode = _time(_Decode(model, ids[:, : context + new], context), threads, seconds)
    protocol = environment_of(model) | {
        "batch": 1,
        "prompt": prompt,
        "context": context,
        "new": new,
        "threads": threads,
    }
    protocol["compiled"] = hasattr(model, "_orig_mod")
    return Latency(
        prefill.median * 1e3, prefill.iqr * 1e3, len(prefill.times),
        decode.median * 1e3 / new, decode.iqr * 1e3 / new, len(decode.times), kv_bytes, protocol,
    )  # fmt: skip


class _Prefill:
    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def __call__(self) -> None:
        self.model(input_ids=self.ids, use_cache=True)


class _Decode:
    def __init__(self, model: nn.Module, ids: Tensor, context: int) -> None:
        self.model, self.ids, self.context = model, ids, context
        self.cache = _cache_of(model, ids[:, :context])

    def __call__(self) -> None:
        cache = copy.deepcopy(self.cache)
        for position in range(self.context, self.ids.shape[1]):
            self.model(input_ids=self.ids[:, position : position + 1], past_key_values=cache, use_cache=True)


def _cache_of(model: nn.Module, ids: Tensor) -> object:
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if cache is None:
        raise ModelError(f"{type(model).__name__} returns no KV cache (past_key_values): decoding cannot be timed.")
    return cache


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor of two or more dimensions that `value` holds, once: caches are lists of layers or nests of tuples."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.ndim > 1:  # a sliding window also keeps a counter
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), seen)


def _time(run: object, threads: int, seconds: float) -> Measurement:
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    measured = timer.blocked_autorange(min_run_time=seconds)
    if len(measured.times) < RUNS:  # one slow run fills the time, and has no spread
        measured = timer.blocked_autorange(min_run_time=RUNS * measured.median)
    return measured


def _ids(model: nn.Module, length: int) -> Tensor:
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return (torch.arange(length) % rows)[None]  # which tokens does not matter, that they are not all one may (routers)
