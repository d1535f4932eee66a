"""What a search has tried, kept in a file as it goes, so that a search that was killed goes on."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..engine.lock import FileLock
from ..engine.work import write_whole
from ..errors import ConfigError, OutputError
from ..plan import Plan

SURE = 2.0  # standard errors that plans must be closer by, all tries together: luck passes in one case of 44
FINALISTS = 3  # plans that are held against uniform on unseen data
_PAIRS = 32  # parts of the data that two plans are compared on
_ENDED = 2  # so often may the process end while a plan is being tried


@dataclass(frozen=True)
class Tried:
    """One candidate. divergence: mean KL from the dense model in nats on the data searched on, or None with the reason why not.
    unseen: the same on data kept for the verdict, for those that got so far. seconds: planning, pruning and judging."""

    name: str
    divergence: float | None = None
    unseen: float | None = None
    seconds: float = 0.0
    reason: str = ""

    def with_unseen(self, rows: Tensor | None) -> "Tried":
        return self if rows is None else replace(self, unseen=float(rows.mean()))


def nearest_of(tried: Iterable[Tried]) -> list[str]:
    """The names of those that are nearest to the dense model, but for uniform, which is held against them in any case."""
    ranked = sorted((one for one in tried if one.divergence is not None), key=lambda one: one.divergence or 0.0)
    return [one.name for one in ranked if one.name != "uniform"][:FINALISTS]


class Record(AbstractContextManager["Record"]):
    """The file of one search, ours alone within the context; without a path nothing is kept.

    Raises ConfigError if the file is another search's or another process is at it, OutputError if it cannot be written.
    """

    def __init__(self, path: Path | None, key: Mapping[str, str]) -> None:
        self.path, self.key = path, dict(key)
        self._tried: dict[str, Tried] = {}
        self._begun: dict[str, int] = {}
        self.plans: dict[str, Plan] = {}
        self._lock = None if path is None else FileLock(path.with_name(f"{path.name}.lock"))

    def __enter__(self) -> "Record":
        if self.path is None or self._lock is None:
            return self
        try:
            ours = self._lock.take()
        except OSError as error:
            raise OutputError(f'record "{self.path}" cannot be made: {error.strerror}.') from error
        if not ours:
            raise ConfigError(
                f'record "{self.path}": another search is at it. Wait for that to end, or write elsewhere.'
            )
        try:
            self._read(self.path)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def get(self, name: str) -> Tried | None:
        """What is known of it; one that ended the process time and again counts as tried."""
        if self._begun.get(name, 0) >= _ENDED:
            return Tried(name, reason=f"the process ended {_ENDED} times while it was tried: too little memory?")
        return self._tried.get(name)

    def begin(self, name: str) -> None:
        """It is being tried: if the process ends now, that will be known."""
        self._begun[name] = self._begun.get(name, 0) + 1
        self._write()

    def stop(self, name: str) -> None:
        """The user stopped it; that is not its fault."""
        self._begun.pop(name, None)
        self._write()

    def add(self, tried: Tried, plan: Plan | None = None) -> None:
        """plan: kept in `plans` as long as the verdict may ask for it, so that nothing is scored twice: uniform's and the nearest ones'."""
        self._tried[tried.name] = tried
        self._begun.pop(tried.name, None)
        if plan is not None:
            self.plans[tried.name] = plan
            kept = {"uniform", *nearest_of(self._tried.values())}
            self.plans = {name: one for name, one in self.plans.items() if name in kept}
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            tried = [asdict(one) for one in self._tried.values()]
            plans = {name: plan.to_dict() for name, plan in self.plans.items()}
            entry = {"search": self.key, "tried": tried, "begun": self._begun, "plans": plans}
            write_whole(self.path, f"{json.dumps(entry, indent=1)}\n".encode())

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found, tried = entry["search"], {one["name"]: Tried(**one) for one in entry["tried"]}
            begun = {str(name): int(count) for name, count in entry["begun"].items()}
            plans = {str(name): Plan.model_validate(plan) for name, plan in entry["plans"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise ConfigError(f"{path}: no readable record of a search; remove it to start again.") from error
        if changed := sorted(name for name in {*found, *self.key} if found.get(name) != self.key.get(name)):
            details = "; ".join(f"{name}: {found.get(name)} then, {self.key.get(name)} now" for name in changed)
            raise ConfigError(f"{path}: belongs to another search ({details}). Use another file, or remove it.")
        self._tried, self._begun, self.plans = tried, begun, plans


def errors_asked(rows: int, parts: int = _PAIRS, *, tries: int = 1) -> float:
    """How many standard errors of `paired` over so many rows a gain must be for the certainty of SURE errors that are known exactly.

    tries: plans of which any may pass; so many chances for luck, each is asked for more (Bonferroni). Student's t quantile for the parts
    that the error is estimated from (Cornish-Fisher's expansion, within 2 %); infinite for fewer than four, whose error says too little.
    """
    free = min(rows, parts) - 1
    if free < 3:
        return math.inf
    normal = NormalDist()
    z = SURE if tries <= 1 else -normal.inv_cdf(normal.cdf(-SURE) / tries)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / free**power for power, term in enumerate(terms, start=1))


def paired(before: Tensor, after: Tensor, parts: int = _PAIRS) -> tuple[float, float]:
    """(mean of before - after, its standard error): over means of up to `parts` runs of neighbouring rows, since neighbours are alike.

    before, after: (rows,). The error is infinite for fewer than two rows, which can tell nothing.
    """
    gains = before - after
    if not torch.isfinite(gains).all():
        return (-torch.inf if torch.isinf(after).any() else torch.inf), 0.0
    if len(gains) < 2:
        return float(gains.mean()), torch.inf
    means = torch.stack([part.mean() for part in gains.tensor_split(min(parts, len(gains)))])
    return float(gains.mean()), float(means.std() / len(means) ** 0.5)
