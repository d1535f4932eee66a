"""How far a compressed model has moved from the dense one: KL divergence and top-1 agreement, token by token.

More sensitive than perplexity, which can stay put while predictions change: losses on some tokens hide gains on others.
"""

from dataclasses import asdict, dataclass

from torch import nn

from ..tasks import undisturbed
from ..tasks.batches import Batches
from .logits import Progress, token_sums
from .protocol import Protocol, protocol_of


@dataclass(frozen=True)
class Divergence:
    """kl: mean of KL(dense || compressed) in nats per token, >= 0. top1: fraction of tokens where both models' first choice is
    the same, in [0, 1]. Over the positions that perplexity scores."""

    kl: float
    top1: float
    tokens: int
    protocol: Protocol

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def divergence(
    model: nn.Module, batches: Batches, *, against: nn.Module, progress: Progress | None = None
) -> Divergence:
    """Of `model` from the dense model `against`, in float32 whatever their dtypes. Same vocabulary needed (ModelError)."""
    with undisturbed([model, against]):
        sums = token_sums(model, batches, against=against, progress=progress)
    return Divergence(
        max(0.0, sums.kl / sums.tokens), sums.agree / sums.tokens, sums.tokens, protocol_of(model, batches)
    )
