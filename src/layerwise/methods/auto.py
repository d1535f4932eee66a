"""Auto: try every method at a few spreads, keep the plan whose predictions stay closest to the dense model's, or uniform.

No paper: what a careful user does by hand. Every candidate plan is carried out with the solver that will be used (with masks from the dense
model's statistics where these suffice), judged by the KL divergence from the dense model on calibration data, and put back. The
closest few are then held against uniform on data that the search did not see; one that is not closer there by more than the
standard error of the paired differences does not count. A search that does not beat uniform returns uniform and says so.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

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

DIALS = {"owl": "spread", "random": "spread", "erk": "power"}  # what sets a plan apart from uniform
TURNS = (0.5, 1.0, 2.0)  # how far each dial is turned, in its default
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
    minutes: float = (
        0.0  # start no candidate after that long; 0: try all. With a limit the machine's speed decides, too
    )
    seed: int = 0
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_sparsities("Auto", self.sparsity, self.min_sparsity, self.max_sparsity)
        if not self.minutes >= 0:
            raise ConfigError(f"Auto.minutes={self.minutes:g}: give a time limit in minutes, or 0 for none.")
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
    """Name -> method set up for this search: uniform and random first, then those that look at no data, then the others."""
    from . import METHODS  # which has Auto in it

    others = [name for name in METHODS if name not in ("uniform", "random", auto.name)]
    asked = [name.strip() for name in auto.only.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in METHODS or name == auto.name]:
        raise ConfigError(
            f'Auto.only="{auto.only}": "{unknown[0]}" is no method to try.{nearest(unknown[0], others)} Methods: {", ".join(others)}.'
        )
    chosen = sorted(
        asked or others, key=lambda name: METHODS[name].needs_data
    )  # stable: else in the order of the table
    made: dict[str, Method] = {}
    for name in ["uniform", "random", *(name for name in chosen if name not in ("uniform", "random"))]:
        made |= dict(_turned(auto, name, METHODS[name]))
    return made


def _turned(auto: Auto, name: str, kind: type[Method]) -> Iterator[tuple[str, Method]]:
    """The method at its default, and with its dial turned down and up."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    common = {
        key: value for key, value in asdict(auto).items() if key in known and key not in ("solver", "only", "minutes")
    }
    dial = DIALS.get(name)
    if dial is None:
        yield name, kind(**common)
        return
    default = known[dial].default
    for turn in sorted(TURNS, key=lambda turn: turn != 1.0):
        value = round(default * turn, 6)  # type: ignore[operator]
        yield f"{name} {dial}={value:g}", kind(**common, **{dial: value})


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
        except LayerwiseError as error:
            if name == "uniform":  # then nothing can be done
                raise
            return Tried(name, reason=str(error))
        mean = sum(divergences) / len(divergences)
        return Tried(name, divergence=mean, seconds=time.perf_counter() - started)

    def _yardstick(self, batches: Sequence[Batch]) -> Yardstick:
        with undisturbed([self.model]):
            return Yardstick(self.model, batches)

    def _judged(self, plan: Plan, trials: Trials, yardstick: Yardstick) -> list[float]:
        with trials.pruned(plan), undisturbed([self.model]):
            return yardstick.divergences(self.model)

    def _verdict(self, methods: dict[str, Method], tried: list[Tried], trials: Trials) -> Search:
        ranked = sorted((one for one in tried if one.divergence is not None), key=lambda one: one.divergence or 0.0)
        finalists = [one.name for one in ranked if one.name != "uniform"][:FINALISTS]
        yardstick, plans, unseen = self._yardstick(self.unseen), {}, {}
        for name in ["uniform", *finalists]:
            plans[name] = methods[name].plan(self.model, self.seen, structure=self.structure)
            unseen[name] = self._judged(plans[name], trials, yardstick)
        tried = [one.with_unseen(unseen.get(one.name)) for one in tried]
        uniform = _mean(unseen["uniform"])
        for name in finalists:
            gain, error = paired(unseen["uniform"], unseen[name])
            if gain > error:
                verdict = (
                    f"{name}: KL divergence {_mean(unseen[name]):.4f} beside uniform's {uniform:.4f} on data the search did not see"
                    f" ({gain:.4f} closer, standard error {error:.4f}; {len(ranked)} plans tried with {self.auto.solver})."
                )
                return Search(self._signed(plans[name], name), tuple(tried), verdict)
        closest = min(finalists, key=lambda name: _mean(unseen[name]), default="none")
        verdict = (
            f"uniform: of {len(ranked)} plans tried with {self.auto.solver}, none is closer to the dense model than uniform"
            f" ({uniform:.4f}) beyond the standard error on data the search did not see"
            + (f"; the nearest was {closest} ({_mean(unseen[closest]):.4f})." if finalists else ".")
        )
        return Search(self._signed(plans["uniform"], "uniform"), tuple(tried), verdict)

    def _signed(self, plan: Plan, name: str) -> Plan:
        """The plan, signed by the search and with its choice beside it."""
        return Plan.model_validate({**plan.to_dict(), "method": {"name": Auto.name, **asdict(self.auto)}})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _nobody(done: int, total: int, now: str) -> None:
    pass
