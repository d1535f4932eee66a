"""After KVTuner's search: what was tried, its front, and the front held against the uniform pairs on data that the search did not see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..allocate import pareto_front
from ..plan import Plan
from .kv_layers import Layers
from .kv_space import Pairs, Space
from .tried import errors_asked, paired

FINALISTS = 8  # of the front, those of least loss, that are measured again


@dataclass(frozen=True)
class TriedBits:
    """One choice. bits: of a cached number, as the budget counts them. true, nominal: with and without scales and offsets. loss: on the
    data searched on; unseen: on the data kept for the verdict, for those that got so far. uniform: one pair for all."""

    pairs: Pairs
    bits: float
    true: float
    nominal: float
    loss: float
    uniform: bool
    unseen: float | None = None

    @classmethod
    def of(cls, pairs: Pairs, layers: Layers, loss: float) -> "TriedBits":
        counted, true, nominal = (float(layers.bits(pairs, plain)) for plain in (layers.nominal, False, True))
        return cls(pairs, counted, true, nominal, loss, len(set(pairs)) == 1)

    @property
    def word(self) -> str:
        """K8V4 of a uniform choice; else how many attentions have which pair."""
        names = [f"K{keys}V{values}" for keys, values in sorted(set(self.pairs), reverse=True)]
        if self.uniform:
            return names[0]
        counts = [sum(f"K{keys}V{values}" == name for keys, values in self.pairs) for name in names]
        return " ".join(f"{count}×{name}" for count, name in zip(counts, names, strict=True))


@dataclass(frozen=True)
class KVSearch:
    """plan: what to use. tried: every choice that was measured, fewest bits first. verdict: one sentence. space: what could be chosen."""

    plan: Plan
    tried: tuple[TriedBits, ...]
    verdict: str
    space: Space

    @property
    def front(self) -> list[TriedBits]:
        """Of all that was tried, what nothing beats in bits and loss; fewest bits first."""
        return front_of(self.tried)


@dataclass(frozen=True)
class Verdict:
    """pairs: of the choice. tried: all, with the loss on unseen data of those that got so far. sentence: why."""

    pairs: Pairs
    tried: tuple[TriedBits, ...]
    sentence: str


def front_of(tried: Sequence[TriedBits]) -> list[TriedBits]:
    """Those that nothing beats in bits and loss, fewest bits first."""
    return [tried[place] for place in pareto_front({i: (one.bits, one.loss) for i, one in enumerate(tried)})]


def verdict_on(
    tried: Sequence[TriedBits], cap: float, fresh: Callable[[Pairs], Tensor], what: str = "KL divergence"
) -> Verdict:
    """The choice of at most `cap` bits with the least loss on unseen data, if it beats every uniform pair of at most as many bits there.

    By more than two standard errors of the paired differences, and more where several had the chance (`errors_asked`), from the best of
    them; else that one. fresh: pairs -> (rows,) of losses.
    """
    allowed = [one for one in tried if one.bits <= cap]
    finalists = sorted((one for one in front_of(allowed) if not one.uniform), key=lambda one: one.loss)[:FINALISTS]
    rows = {one.pairs: fresh(one.pairs) for one in [*(one for one in allowed if one.uniform), *finalists]}
    means = {pairs: float(some.mean()) for pairs, some in rows.items()}
    best = min((one for one in allowed if one.uniform), key=lambda one: (means[one.pairs], one.bits))
    chosen = min([*finalists, best], key=lambda one: (means[one.pairs], one.bits))
    gain, error = paired(rows[best.pairs], rows[chosen.pairs])
    sure = errors_asked(len(rows[best.pairs]), tries=len(finalists))
    head = f"{what} on data the search did not see"

    def said(one: TriedBits) -> str:
        return f"{means[one.pairs]:.4g} at {one.true:.3g} true bits ({one.nominal:.3g} nominal)"

    if chosen is not best and gain > sure * error:
        sentence = (
            f"{chosen.word}: {head} {said(chosen)}, beside {best.word}'s {said(best)}:"
            f" {gain:.3g} less, standard error {error:.2g}; {len(tried)} choices measured."
        )
    else:
        nearest = "" if chosen is best else f"; the nearest was {chosen.word} ({means[chosen.pairs]:.4g})"
        sentence = (
            f"{best.word} for all: {head} {said(best)}, and none of {len(tried)} choices is better beyond {sure:.1f}"
            f" standard errors{nearest}."
        )
        chosen = best
    unseen = [replace(one, unseen=means.get(one.pairs)) for one in tried]
    return Verdict(chosen.pairs, tuple(sorted(unseen, key=lambda one: (one.bits, one.loss))), sentence)
