"""A search under way: try every candidate, judge it, put it back; then decide on data that it did not see."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..engine import Trials
from ..errors import LayerwiseError
from ..plan import Plan
from ..scores import watched
from ..structure import Structure
from ..tasks import Batch, Batches, Yardstick, undisturbed
from .assemble import sizes_of
from .base import Method
from .tried import Record, Tried, errors_asked, nearest_of, paired

Progress = Callable[[int, int, str], None]


class _OutOfTime(Exception):
    """Not a LayerwiseError: no candidate's failure, but the end of the time that it was given."""


@dataclass(frozen=True)
class Search:
    """plan: what to use. tried: every candidate, in order. verdict: one sentence."""

    plan: Plan
    tried: tuple[Tried, ...]
    verdict: str


@dataclass
class Hunt:
    """candidates: name -> method, "uniform" among them. bounds: on the sparsity of every layer. judged: tokens that a plan is held
    against. minutes: start no candidate after that long, and give up one that is still being scored; 0: no limit. unseen: batches for
    the verdict alone."""

    model: nn.Module
    structure: Structure
    trials: Trials
    record: Record
    candidates: Mapping[str, Method]
    bounds: tuple[float, float]
    judged: int
    minutes: float
    seen: Batches
    unseen: Sequence[Batch]
    progress: Progress

    def run(self) -> Search:
        """Errors as of the plan and the trial of uniform; other candidates that fail are rows with the reason."""
        yardstick = self._yardstick(self.seen)
        ends = time.perf_counter() + 60 * self.minutes if self.minutes else math.inf
        tried = list[Tried]()
        for number, (name, method) in enumerate(self.candidates.items()):
            self.progress(number, len(self.candidates) + 1, name)
            if (before := self.record.get(name)) is not None:
                tried.append(before)
                continue
            if name != "uniform" and time.perf_counter() > ends:
                tried.append(Tried(name, reason="no time was left"))
                continue
            self.record.begin(name)
            try:
                with watched(self._clock(number, name, ends)):
                    one, plan = self._one(name, method, yardstick)
            except _OutOfTime as late:
                self.record.stop(name)
                tried.append(Tried(name, reason=str(late)))
                continue
            except BaseException:
                self.record.stop(name)
                raise
            tried.append(one)
            self.record.add(one, plan)
        self.progress(len(self.candidates), len(self.candidates) + 1, "verdict on unseen data")
        return self._verdict(tried)

    def _clock(self, number: int, name: str, ends: float) -> Progress:
        """What the scores of this candidate tell how far they are: it passes that on, and stops them when the time is up."""
        started = time.perf_counter()

        def step(done: int, total: int, now: str) -> None:
            clock = time.perf_counter()
            share = done / total if total else 1.0
            if name != "uniform" and clock > ends and share < 1:
                raise _OutOfTime(
                    f"no time was left: {share:.0%} of its scores took {(clock - started) / 60:.1f} minutes"
                )
            self.progress(number, len(self.candidates) + 1, f"{name}: {share:.0%} scored")

        return step

    def _one(self, name: str, method: Method, yardstick: Yardstick) -> tuple[Tried, Plan | None]:
        started = time.perf_counter()
        try:
            plan = method.plan(self.model, self.seen, structure=self.structure)
            if problem := self._outside(plan):
                return Tried(name, reason=problem), None
            divergence = float(self._held_against(plan, yardstick).mean())
        except (LayerwiseError, RuntimeError, MemoryError) as error:  # torch's lack of memory is a RuntimeError
            if name == "uniform":
                raise
            reason = " ".join(str(error).split())[:200]
            said = reason if isinstance(error, LayerwiseError) else f"{type(error).__name__}: {reason}"
            return Tried(name, reason=said), None
        return Tried(name, divergence=divergence, seconds=time.perf_counter() - started), plan

    def _outside(self, plan: Plan) -> str:
        """What is wrong with the plan of a method that knows no bounds; nothing where it keeps to those of the search."""
        (low, high), sizes = self.bounds, sizes_of(self.structure)
        shares = {name: count / sizes[name] for name, count in plan.zeros(self.structure.layers).items()}
        wrong = [name for name, share in shares.items() if not low - 1 / sizes[name] <= share <= high + 1 / sizes[name]]
        return f'its sparsity of "{wrong[0]}", {shares[wrong[0]]:.4f}, is outside the bounds.' if wrong else ""

    def _yardstick(self, batches: Sequence[Batch]) -> Yardstick:
        with undisturbed([self.model]):
            return Yardstick(self.model, enough(batches, self.judged))

    def _held_against(self, plan: Plan, yardstick: Yardstick) -> Tensor:
        with self.trials.pruned(plan), undisturbed([self.model]):
            return yardstick.rows(self.model)

    def _verdict(self, tried: list[Tried]) -> Search:
        finalists = nearest_of(tried)
        yardstick, rows = self._yardstick(self.unseen), dict[str, Tensor]()
        for name in ["uniform", *finalists]:
            rows[name] = self._held_against(self.record.plans[name], yardstick)
        gains = {name: paired(rows["uniform"], rows[name]) for name in finalists}
        sure = errors_asked(len(rows["uniform"]), tries=len(finalists))
        chosen = next((name for name, (gain, error) in gains.items() if gain > sure * error), "uniform")
        what = "KL divergence" if yardstick.logits else "relative squared error"
        judged = sum(one.divergence is not None for one in tried)
        count = f"{judged} plan{'s' if judged != 1 else ''} tried with {self.trials.solver.name}"
        verdict = _sentence(chosen, {name: float(some.mean()) for name, some in rows.items()}, gains, what, count, sure)
        tried = [one.with_unseen(rows.get(one.name)) for one in tried]
        plan = self.record.plans[chosen]
        return Search(plan.model_copy(update={"notes": (*plan.notes, verdict)}), tuple(tried), verdict)


def _sentence(
    chosen: str,
    means: Mapping[str, float],
    gains: Mapping[str, tuple[float, float]],
    what: str,
    count: str,
    sure: float,
) -> str:
    uniform = means["uniform"]
    if chosen != "uniform":
        gain, error = gains[chosen]
        return (
            f"{chosen}: {what} {means[chosen]:.4f} beside uniform's {uniform:.4f} on data the search did not see"
            f" ({gain:.4f} closer, standard error {error:.4f}; {count})."
        )
    closest = min(gains, key=means.__getitem__, default="")
    return (
        f"uniform: {count}, none is closer to the dense model than uniform ({what} {uniform:.4f}) beyond {sure:.1f} standard errors"
        f" on data the search did not see{f'; the nearest was {closest} ({means[closest]:.4f})' if closest else ''}."
    )


def enough(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The first batches that hold so many tokens (samples, where there are no tokens), or all of them."""
    chosen, held = list[Batch](), 0
    for batch in batches:
        if held >= rows:
            break
        chosen.append(batch)
        tokens = batch.get("decoder_input_ids", batch.get("input_ids"))
        held += tokens.numel() if tokens is not None else len(next(iter(batch.values())))
    return chosen
