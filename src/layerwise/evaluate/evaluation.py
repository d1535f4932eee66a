"""`evaluate`: what a compressed language model lost, measured in one pass over the data together with the dense model."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..cache import QuantizedKVCache
from ..tasks import undisturbed
from ..tasks.batches import Batch, Batches
from ..tasks.text import check_vocabulary
from .cached import cached_logits, check_cache
from .logits import Convention, Progress, dtype_of, token_sums
from .perplexity import exponential
from .protocol import Protocol, model_hash, protocol_of


@dataclass(frozen=True)
class CacheFigures:
    """What a quantised KV cache holds once a text is long, full precision counted as 16 bits: see `QuantizedKVCache.long_run`.

    plain_bytes: of a token with the plain cache.
    """

    name: str
    bits: float
    bytes_per_token: float
    plain_bytes: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Per-token figures over `tokens` scored tokens. kl (nats), top1 and dense_perplexity are None without a dense model, cache
    without a quantised one."""

    perplexity: float
    tokens: int
    kl: float | None
    top1: float | None
    dense_perplexity: float | None
    protocol: Protocol
    cache: CacheFigures | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    data: Batches,
    *,
    against: nn.Module | None = None,
    convention: Convention = "standard",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    cache: QuantizedKVCache | None = None,
    step: int | None = None,
) -> Evaluation:
    """Perplexity of `model` and, `against` the dense model, its KL divergence, top-1 agreement and the dense perplexity.

    cache: `model`, not `against`, attends to keys and values as they are in such a cache (a fresh one for every batch); made with
    quantize_prefill=True, windows go through in one pass. step: else, or to keep a pass's own tokens exact, tokens of a pass. `against`
    may be the model itself: what the cache alone costs.
    The model is evaluated where it is, or on `device`; its mode, its device and the random state are as before afterwards.
    Raises DataError (token ids outside the vocabulary, no token ids), ModelError (no causal language model, other vocabulary).
    """
    models = [model] if against is None else [model, against]
    for one in models:
        if (rows := _embedding_rows(one)) is not None:
            check_vocabulary(data, rows)
    if cache is not None:
        check_cache(cache, step)
    used: list[QuantizedKVCache] = []

    def cached(batch: Batch) -> Tensor:
        assert cache is not None  # noqa: S101  (only then is this called)
        used[:] = [cache.fresh()]
        return cached_logits(model, batch, used[0], step)

    with undisturbed(models, device):
        through = None if cache is None else cached
        sums = token_sums(model, data, against=against, convention=convention, progress=progress, cached=through)
        protocol = protocol_of(model, data) | {
            "convention": convention,
            "scored_tokens": sums.tokens,
            "windows": sums.windows,
        }
        if cache is not None:
            passes = "one pass" if step is None else f"passes of {step}"
            protocol |= {"kv_cache": cache.name, "kv_quantize_prefill": cache.quantize_prefill, "kv_passes": passes}
        if against is not None:
            protocol |= {"dense_model": model_hash(against), "dense_dtype": dtype_of(against)}
    figures = _figures(used[0]) if used else None
    if against is None:
        return Evaluation(exponential(sums.nll / sums.tokens), sums.tokens, None, None, None, protocol, figures)
    return Evaluation(
        perplexity=exponential(sums.nll / sums.tokens),
        tokens=sums.tokens,
        kl=max(0.0, sums.kl / sums.tokens),  # rounding alone can make it negative
        top1=sums.agree / sums.tokens,
        dense_perplexity=exponential(sums.dense_nll / sums.tokens),
        protocol=protocol,
        cache=figures,
    )


def _figures(cache: QuantizedKVCache) -> CacheFigures:
    bits, size = cache.long_run()
    return CacheFigures(cache.name, bits, size, size * 16 / bits, cache.notes)


def _embedding_rows(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get(), "weight", None) if get is not None else None
    return None if weight is None else int(weight.shape[0])
