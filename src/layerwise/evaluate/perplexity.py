"""Perplexity, by an exact definition: exp of the mean negative log-likelihood per scored token, in nats.

| convention | windows                                            | whose                                                     |
|------------|----------------------------------------------------|-----------------------------------------------------------|
| standard   | of one length, the shorter last one dropped        | GPTQ, SparseGPT, OWL and most papers (length 2048)        |
| wanda      | the same, length = the model's whole context       | the Wanda repository: 2048 for LLaMA-1, 4096 for LLaMA-2  |
| all        | the shorter last one counts, weighted by tokens    | plain scripts                                             |

Windows do not overlap and see nothing before themselves; the first token of each is never scored. The batch size does not matter.
Perplexities compare only under one convention, length, tokenizer and text: the protocol says which.
Not here: word perplexity of lm-evaluation-harness (another denominator) and sliding windows.
"""

import math
from dataclasses import asdict, dataclass

from torch import nn

from ..tasks import undisturbed
from ..tasks.batches import Batches
from .logits import Convention, Progress, token_sums
from .protocol import Protocol, protocol_of


@dataclass(frozen=True)
class Perplexity:
    """value = exp(nll); nll in nats per token over `tokens` scored tokens of `windows` windows."""

    value: float
    nll: float
    tokens: int
    windows: int
    protocol: Protocol

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def perplexity(
    model: nn.Module, batches: Batches, *, convention: Convention = "standard", progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a causal language model on token windows (see `held_out`). Its mode and the random state stay as they are."""
    with undisturbed([model]):
        sums = token_sums(model, batches, convention=convention, progress=progress)
    protocol = protocol_of(model, batches) | {"convention": convention}
    nll = sums.nll / sums.tokens
    return Perplexity(exponential(nll), nll, sums.tokens, sums.windows, protocol)


def exponential(nll: float) -> float:
    """exp, infinite where a float overflows: a ruined model has a perplexity too."""
    return math.exp(nll) if nll < 709 else math.inf
