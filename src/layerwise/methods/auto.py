"""Auto: try every method at a few spreads, keep the plan whose predictions stay closest to the dense model's, or uniform.

No paper: what a careful user does by hand. Every candidate plan is carried out with the solver that will be used (with masks from the dense
model's statistics where these suffice), judged by the KL divergence from the dense model on calibration data, and put back. The
closest few are then held against uniform on data that the search did not see; one that is not closer there by more than the
standard error of the paired differences does not count. A search that does not beat uniform returns uniform and says so.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..allocate import check_feasible
from ..engine import Trials, weights_key
from ..errors import ConfigError, DataError, LayerwiseError
from ..plan import Plan
from ..settings import nearest
from ..solvers import Solver, solver_from
from ..structure import Structure
from ..tasks import Batch, Batches, Yardstick, undisturbed
from ..version import __version__
from .assemble import found, sizes_of
from .base import Method, check_sparsities
from .tried import Record, Tried, paired

_SPREADS = tuple({"spread": 0.3 * turn} for turn in (1.0, 0.5, 2.0))  # of methods that spread by a share of the target
# settings beside the method's own that are tried: its dial at the default, half and twice as far, or another order
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "random": ({"spread": 0.08}, {"spread": 0.04}, {"spread": 0.16}),
    "erk": ({"power": 1.0}, {"power": 0.5}, {"power": 2.0}),
    "owl": ({"spread": 0.08}, {"spread": 0.04}, {"spread": 0.16}),
    "alpha-pruning": _SPREADS,
    "farms": _SPREADS,
    "ecoflap": ({"order": "first"}, {"order": "zeroth"}),
}
LATE = (
    "alpha-pruning",
    "farms",
    "ecoflap",
    "synflow",
)  # take minutes to hours on large models, so a time limit drops them first
FINALISTS = 3  # plans that are held against uniform on unseen data
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Auto:
    """All methods of this package that share a sparsity out; any of them by `only`."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "tries every method, keeps the plan that diverges least from the dense model, or uniform"
    needs_data: ClassVar[bool] = True

    sparsity: float = 0.5
    only: str = ""  # "owl,erk": methods to try beside uniform and random; "": all
    solver: str = "wanda"  # the one that will be used: what suits one solver need not suit another
    judged: int = 8192  # tokens (samples, where there are none) that a plan is held against, and again for the verdict
    minutes: float = 0.0  # start no candidate after that long (then the machine's speed decides, too); 0: try all
    seed: int = 0
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_sparsities("Auto", self.sparsity, self.min_sparsity, self.max_sparsity)
        if not self.minutes >= 0:
            raise ConfigError(f"Auto.minutes={self.minutes:g}: give a time limit in minutes, or 0 for none.")
        if self.judged < 1:
            raise ConfigError(f"Auto.judged={self.judged}: give a number of tokens, 1 or more.")
        solver_from({"name": self.solver})
        candidates(self)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """The plan of `search`, which also tells what was tried."""
        return self.search(model, data, structure=structure).plan

    def search(
        self,
        model: nn.Module,
        data: Batches | None = None,
        *,
        structure: Structure | None = None,
        record: Path | None = None,
        progress: Progress | None = None,
    ) -> "Search":
        """Try, judge, decide. The model holds its own weights afterwards.

        The last quarter of the batches is kept for the verdict. record: a file that what was tried is written to; a search for the same
        thing goes on from it. Raises DataError for fewer than two batches; candidates that cannot be made are rows with the reason.
        """
        structure = found(model, structure)
        if data is None or len(data) < 2:
            raise DataError(
                "Auto needs calibration data (--data), two batches or more: it searches on some and decides on the others."
            )
        check_feasible(sizes_of(structure), self.sparsity, self.min_sparsity, self.max_sparsity)
        unseen = max(1, len(data) // 4)
        seen = Batches(data[:-unseen], {**data.protocol, "part": "seen"})
        return _Hunt(self, model, structure, seen, data[-unseen:], record, progress or _nobody).run()


@dataclass(frozen=True)
class Search:
    """plan: what to use. tried: every candidate, in order. verdict: one sentence."""

    plan: Plan
    tried: tuple[Tried, ...]
    verdict: str


def candidates(auto: Auto) -> dict[str, Method]:
    """Name -> method set up for this search: uniform and random first, then those that look at no data, the slow ones last."""
    from . import METHODS  # which has Auto in it

    others = [name for name in METHODS if name not in ("uniform", "random", auto.name)]
    asked = [name.strip() for name in auto.only.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in METHODS or name == auto.name]:
        raise ConfigError(
            f'Auto.only="{auto.only}": "{unknown[0]}" is no method to try.{nearest(unknown[0], others)} Methods: {", ".join(others)}.'
        )
    # stable: else in the order of the table
    chosen = sorted(asked or others, key=lambda name: (name in LATE, METHODS[name].needs_data))
    made: dict[str, Method] = {}
    for name in ["uniform", "random", *(name for name in chosen if name not in ("uniform", "random"))]:
        made |= _variants(auto, name, METHODS[name])
    return made


def _variants(auto: Auto, name: str, kind: type[Method]) -> dict[str, Method]:
    """The method with the settings of the search that it knows, once for each of its variants."""
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {"sparsity": auto.sparsity, "seed": auto.seed}
    # a bound that was not asked for leaves the method its own
    bounds = {"min_sparsity": (auto.min_sparsity, 0.0), "max_sparsity": (auto.max_sparsity, 1.0)}
    given |= {key: value for key, (value, free) in bounds.items() if value != free}
    common = {key: value for key, value in given.items() if key in known}
    made = {}
    for more in VARIANTS.get(name, ({},)):
        words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in more.items()]
        made[" ".join([name, *words])] = kind(**common, **more)
    return made


def _enough(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The first batches that hold so many tokens (samples, where there are no tokens), or all of them."""
    chosen, held = list[Batch](), 0
    for batch in batches:
        if held >= rows:
            break
        chosen.append(batch)
        tokens = batch.get("decoder_input_ids", batch.get("input_ids"))
        held += tokens.numel() if tokens is not None else len(next(iter(batch.values())))
    return chosen


@dataclass
class _Hunt:
    """One search under way."""

    auto: Auto
    model: nn.Module
    structure: Structure
    seen: Batches
    unseen: Sequence[Batch]
    record: Path | None
    progress: Progress
    plans: dict[str, Plan] = field(default_factory=dict)

    def run(self) -> Search:
        solver: Solver = solver_from({"name": self.auto.solver})
        trials = Trials(self.model, self.structure, solver, self.seen, self.auto.seed)
        yardstick = self._yardstick(self.seen)
        key = {
            "model": weights_key(self.model, self.structure),
            "search": repr({**asdict(self.auto), "minutes": 0.0}),
            "data": self.seen.hash,
            "layerwise": __version__,
            "torch": torch.__version__,
        }
        record = Record(self.record, key)
        methods = candidates(self.auto)
        started, tried = time.perf_counter(), list[Tried]()
        for number, (name, method) in enumerate(methods.items()):
            self.progress(number, len(methods) + 1, name)
            if (before := record.get(name)) is not None:
                tried.append(before)
                continue
            late = self.auto.minutes and time.perf_counter() - started > 60 * self.auto.minutes
            if late and name != "uniform":
                tried.append(Tried(name, reason="no time was left"))
                continue
            tried.append(self._one(name, method, trials, yardstick))
            record.add(tried[-1])
        self.progress(len(methods), len(methods) + 1, "verdict on unseen data")
        return self._verdict(methods, tried, trials)

    def _one(self, name: str, method: Method, trials: Trials, yardstick: Yardstick) -> Tried:
        started = time.perf_counter()
        try:
            plan = method.plan(self.model, self.seen, structure=self.structure)
            divergences = self._judged(plan, trials, yardstick)
            self.plans[name] = plan
        except LayerwiseError as error:
            if name == "uniform":  # then nothing can be done
                raise
            return Tried(name, reason=str(error))
        mean = sum(divergences) / len(divergences)
        return Tried(name, divergence=mean, seconds=time.perf_counter() - started)

    def _yardstick(self, batches: Sequence[Batch]) -> Yardstick:
        with undisturbed([self.model]):
            return Yardstick(self.model, _enough(batches, self.auto.judged))

    def _judged(self, plan: Plan, trials: Trials, yardstick: Yardstick) -> list[float]:
        with trials.pruned(plan), undisturbed([self.model]):
            return yardstick.divergences(self.model)

    def _verdict(self, methods: dict[str, Method], tried: list[Tried], trials: Trials) -> Search:
        ranked = sorted((one for one in tried if one.divergence is not None), key=lambda one: one.divergence or 0.0)
        finalists = [one.name for one in ranked if one.name != "uniform"][:FINALISTS]
        yardstick, plans, unseen = self._yardstick(self.unseen), self.plans, {}
        for name in ["uniform", *finalists]:
            if name not in plans:  # judged by a search that was killed
                plans[name] = methods[name].plan(self.model, self.seen, structure=self.structure)
            unseen[name] = self._judged(plans[name], trials, yardstick)
        tried = [one.with_unseen(unseen.get(one.name)) for one in tried]
        uniform, what = _mean(unseen["uniform"]), "KL divergence" if yardstick.logits else "relative squared error"
        for name in finalists:
            gain, error = paired(unseen["uniform"], unseen[name])
            if gain > error:
                verdict = (
                    f"{name}: {what} {_mean(unseen[name]):.4f} beside uniform's {uniform:.4f} on data the search did not see"
                    f" ({gain:.4f} closer, standard error {error:.4f}; {len(ranked)} plans tried with {self.auto.solver})."
                )
                return Search(self._signed(plans[name], verdict), tuple(tried), verdict)
        closest = min(finalists, key=lambda name: _mean(unseen[name]), default="none")
        verdict = (
            f"uniform: of {len(ranked)} plans tried with {self.auto.solver}, none is closer to the dense model than uniform"
            f" ({what} {uniform:.4f}) beyond the standard error on data the search did not see"
            + (f"; the nearest was {closest} ({_mean(unseen[closest]):.4f})." if finalists else ".")
        )
        return Search(self._signed(plans["uniform"], verdict), tuple(tried), verdict)

    def _signed(self, plan: Plan, verdict: str) -> Plan:
        """The plan, signed by the search and with the verdict among its notes."""
        method = {"name": Auto.name, **asdict(self.auto)}
        return plan.model_copy(update={"method": method, "notes": (*plan.notes, verdict)})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _nobody(done: int, total: int, now: str) -> None:
    pass
