"""How a KV cache is measured, the same code for every side: quality in passes of a few tokens, time of a decoding step, bytes held.

Nothing but torch, so that it runs in a peer's environment too. A side gives a function that makes an empty cache.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

MakeCache = Callable[[], Any]


@torch.no_grad()
def quality(model: nn.Module, windows: list[Tensor], make: MakeCache, step: int) -> dict[str, float]:
    """Windows of ids go through a new cache in passes of `step` tokens; against the plain forward pass of the same model.

    kl: mean over tokens of KL(plain || cached), nats. perplexity: exp of the mean loss of tokens 2..n. A pass attends to the past as it
    is stored, and to its own tokens as the cache sees fit (transformers' and ours: exactly).
    """
    kl = loss = count = 0.0
    for window in windows:
        plain = log_softmax(model(input_ids=window[None], use_cache=False).logits[0, :-1].float(), dim=-1)
        cache = make()
        parts = [
            model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0] for part in window.split(step)
        ]
        cached = log_softmax(torch.cat(parts)[:-1].float(), dim=-1)
        kl += (plain.exp() * (plain - cached)).sum().item()
        loss -= cached.gather(-1, window[1:, None]).sum().item()
        count += len(window) - 1
    return {"kl": max(0.0, kl / count), "perplexity": math.exp(min(loss / count, 700.0))}


@torch.no_grad()
def decoding(model: nn.Module, ids: Tensor, make: MakeCache, new: int) -> dict[str, float]:
    """ids (batch, context + new): all but the last `new` are the prompt, then one token a step, the same for every cache.

    seconds: median of a step. cpu_seconds: the same by the processor time of all threads, which other work on the machine disturbs
    less. bytes: held by the cache at the end.
    """
    context, cache, seconds, cpu_seconds = ids.shape[1] - new, make(), [], []
    model(input_ids=ids[:, :context], past_key_values=cache, use_cache=True)
    for position in range(context, ids.shape[1]):
        _wait(ids.device)
        started, cpu_started = time.perf_counter(), time.process_time()
        model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        _wait(ids.device)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return {"seconds": median(seconds), "cpu_seconds": median(cpu_seconds), "bytes": held(cache)}


def held(cache: Any) -> int:
    """Bytes of every tensor that the layers of a cache hold, each memory counted once, by what the allocator gave."""
    found = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in _tensors(cache.layers, set())
    }
    return sum(found.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and not vars(value):
        if value.ndim > 1:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, seen)
    elif hasattr(value, "__dict__"):  # a layer, or a tensor of a class of its own that keeps codes and scales inside
        yield from _tensors(vars(value), seen)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
