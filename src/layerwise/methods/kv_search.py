"""KVTuner's search: bits against loss over groups of layers, by NSGA-II in Optuna, in a study that workers share and a kill does not end.

Departures from the official script: D1 the sampler is seeded, anew for each trial, so that a search that goes on does not draw again what
it drew before. D2 a choice above the cap is not measured, since its bits are known beforehand; NSGA-II is told how far above it is. D3
no choice is measured twice; `trials` counts those measured. D4 where there are fewer choices than trials, all are measured.
D5 every second trial is the choice that a sum of effects of the groups, fitted to what was measured, expects to be best (`kv_expected`).
D6 what another worker is measuring is not measured too; one that takes ten times as long as any before it is taken for dead.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingExtra, OutputError
from ..scores.watching import tell
from .kv_expected import Expected
from .kv_space import Pair, Pairs, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

_POPULATION = 24  # of a generation: a search of 200 trials has eight
_STALE = 100  # suggestions without a new choice among them, after which there is nothing left to find
_ABOVE = 1e9  # loss that is written for a choice above the cap; its excess alone decides
_PATIENCE = 10  # a worker that takes so many times as long as the longest trial so far is dead
_KNOWN = "loss "  # what a measured loss is called among the study's attributes, before the pairs


def word(pairs: Pairs) -> str:
    """ "8-4 8-4 2-2": bits of keys and values of every layer."""
    return " ".join(f"{keys}-{values}" for keys, values in pairs)


def explore(
    space: Space,
    bits: Callable[[Pairs], float],
    loss: Callable[[Pairs], float],
    cap: float,
    *,
    trials: int = 200,
    first: Sequence[Pairs] = (),
    always: Sequence[Pairs] = (),
    seed: int = 0,
    storage: "str | Path | BaseStorage | None" = None,
    key: str = "",
    minutes: float = 0.0,
) -> dict[Pairs, float]:
    """Pairs -> loss of all that was measured: `always`, then choices of at most `cap` bits, `first` before others.

    storage: a journal file, a database URL, or what `opened` made of them; None: memory. key: what the losses depend on; another key is
    another study in the same storage. minutes: measure nothing new after that long, but for `always`; 0: no limit. Raises
    MissingExtra without Optuna, OutputError or ConfigError for a storage that cannot be used.
    """
    place = opened(storage) if storage is None or isinstance(storage, (str, Path)) else storage
    with _study(place, key) as study:
        end = time.monotonic() + 60 * minutes if minutes else math.inf
        hunt = _Hunt(study, space, bits, loss, cap, trials, seed, end)
        return hunt.run(first, always)


@dataclass
class _Hunt:
    study: "Study"
    space: Space
    bits: Callable[[Pairs], float]
    loss: Callable[[Pairs], float]
    cap: float
    trials: int
    seed: int
    end: float

    def run(self, first: Sequence[Pairs], always: Sequence[Pairs]) -> dict[Pairs, float]:
        for number, pairs in enumerate(always):
            tell(number, self.trials, "uniform pairs")
            self.measured(pairs)
        expected = Expected(self.space, self.bits, self.cap)
        every = expected.all_within(self.trials)
        listed = first if every is None else every
        # once more: what another worker was at the first time may have died with it
        for pairs in [*listed, *listed]:
            known = self.known()
            if time.monotonic() >= self.end or (every is None and len(known) >= self.trials):
                break
            if self.bits(pairs) <= self.cap and word(pairs) not in known:
                self.tried(pairs)
        asked, stale = 0, 0
        while every is None and time.monotonic() < self.end and stale < _STALE:
            losses = {_pairs_of(name): value for name, value in self.known().items()}
            if len(losses) >= self.trials:
                break
            asked += 1
            self.tried(expected.best(losses, self.at_work()) if asked % 2 else None)
            stale = 0 if len(self.known()) > len(losses) else stale + 1
        return {_pairs_of(name): value for name, value in self.known().items()}

    def known(self) -> dict[str, float]:
        """Losses measured so far, by any worker."""
        found = self.study.user_attrs.items()
        return {name.removeprefix(_KNOWN): float(value) for name, value in found if name.startswith(_KNOWN)}

    def measured(self, pairs: Pairs) -> float:
        """The loss, from the study where it is there."""
        known = self.known()
        if (name := word(pairs)) not in known:
            tell(len(known), max(self.trials, len(known) + 1), f"{self.bits(pairs):.2f} bits")
            # no number, or none that is finite: the worst there is, which every storage can hold
            known[name] = value if math.isfinite(value := self.loss(pairs)) else _ABOVE
            self.study.set_user_attr(f"{_KNOWN}{name}", known[name])
        return known[name]

    def at_work(self, number: int | None = None) -> set[Pairs]:
        """What other workers are measuring now, in trials before this number; those that a kill left behind are left out."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        took = [trial.duration.total_seconds() for trial in trials if trial.state.is_finished() and trial.duration]
        now, found = datetime.now(), set()
        for trial in trials if number is None else trials[:number]:
            if trial.state != TrialState.RUNNING or len(trial.params) < len(self.space.options):
                continue
            age = (now - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
            if not took or age <= _PATIENCE * max(took):
                found.add(self.space.chosen([trial.params[f"group{i}"] for i in range(len(trial.params))]))
        return found

    def tried(self, pairs: Pairs | None) -> None:
        """One trial of the study: of these pairs, or of what NSGA-II suggests; none where another worker is at it."""
        import optuna

        if pairs is not None:
            if (places := self.space.places(pairs)) is None:
                return
            self.study.enqueue_trial(places)
        number = len(self.study.get_trials(deepcopy=False))
        digest = hashlib.sha256(f"{self.seed}:{number}".encode()).digest()
        self.study.sampler = optuna.samplers.NSGAIISampler(
            population_size=_POPULATION, seed=int.from_bytes(digest[:4], "little")
        )
        trial = self.study.ask()
        try:
            options = self.space.options
            places = {f"group{i}": trial.suggest_int(f"group{i}", 0, len(some) - 1) for i, some in enumerate(options)}
            suggested = self.space.chosen(list(places.values()))
            if suggested in self.at_work(trial.number):
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                return
            held = self.bits(suggested)
            trial.set_constraint("bits", held - self.cap)
            value = self.measured(suggested) if held <= self.cap else _ABOVE
        except BaseException:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        self.study.tell(trial, (held, value))


@contextmanager
def _study(storage: "BaseStorage | None", key: str) -> Iterator["Study"]:
    """The study of this key; meanwhile Optuna does not log every trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna.create_study(
            study_name=f"kvtuner-{key}", storage=storage, directions=["minimize", "minimize"], load_if_exists=True
        )
    finally:
        optuna.logging.set_verbosity(before)


def opened(storage: str | Path | None) -> "BaseStorage | None":
    """The storage by its name. Raises MissingExtra, OutputError, ConfigError."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        if error.name != "optuna":  # installed but broken: do not tell the user to install it
            raise
        raise MissingExtra("kvtuner searches with Optuna: pip install 'layerwise[search]'.") from error
    if storage is None:
        return None
    from sqlalchemy.exc import SQLAlchemyError

    unreadable = (ValueError, KeyError, TypeError, ImportError, SQLAlchemyError, optuna.exceptions.StorageInternalError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            if "://" in str(storage):
                return optuna.storages.RDBStorage(str(storage))
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(JournalFileBackend(str(storage)))
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f'storage "{storage}" of the search cannot be used: {reason}.') from error
        except unreadable as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f'storage "{storage}": no readable record of a search ({reason}). Remove it to start again, or give another.'
            ) from error


def _pairs_of(name: str) -> Pairs:
    """What `word` wrote."""
    found: list[Pair] = []
    for one in name.split():
        keys, _, values = one.partition("-")
        found.append((int(keys), int(values)))
    return tuple(found)


def settings_key(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that tell one question from another."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]
