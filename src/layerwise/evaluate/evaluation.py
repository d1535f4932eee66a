"""`evaluate`: what a compressed language model lost, measured in one pass over the data together with the dense model."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from ..tasks import undisturbed
from ..tasks.batches import Batches
from ..tasks.text import check_vocabulary
from .logits import Convention, Progress, dtype_of, token_sums
from .perplexity import exponential
from .protocol import Protocol, model_hash, protocol_of


@dataclass(frozen=True)
class Evaluation:
    """Per-token figures over `tokens` scored tokens. kl (nats), top1 and dense_perplexity are None without a dense model."""

    perplexity: float
    tokens: int
    kl: float | None
    top1: float | None
    dense_perplexity: float | None
    protocol: Protocol

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
) -> Evaluation:
    """Perplexity of `model` and, `against` the dense model, its KL divergence, top-1 agreement and the dense perplexity.

    The model is evaluated where it is, or on `device`; its mode, its device and the random state are as before afterwards.
    Raises DataError (token ids outside the vocabulary, no token ids), ModelError (no causal language model, other vocabulary).
    """
    models = [model] if against is None else [model, against]
    for one in models:
        if (rows := _embedding_rows(one)) is not None:
            check_vocabulary(data, rows)
    with undisturbed(models, device):
        sums = token_sums(model, data, against=against, convention=convention, progress=progress)
        protocol = protocol_of(model, data) | {
            "convention": convention,
            "scored_tokens": sums.tokens,
            "windows": sums.windows,
        }
        if against is not None:
            protocol |= {"dense_model": model_hash(against), "dense_dtype": dtype_of(against)}
    if against is None:
        return Evaluation(exponential(sums.nll / sums.tokens), sums.tokens, None, None, None, protocol)
    return Evaluation(
        perplexity=exponential(sums.nll / sums.tokens),
        tokens=sums.tokens,
        kl=max(0.0, sums.kl / sums.tokens),  # rounding alone can make it negative
        top1=sums.agree / sums.tokens,
        dense_perplexity=exponential(sums.dense_nll / sums.tokens),
        protocol=protocol,
    )


def _embedding_rows(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get(), "weight", None) if get is not None else None
    return None if weight is None else int(weight.shape[0])
