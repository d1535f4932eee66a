"""Auto: try every method at a few spreads, keep the plan whose predictions stay closest to the dense model's, or uniform.

No paper: what a careful user does by hand. Every candidate plan is carried out with the solver that will be used (with masks from the dense
model's statistics where these suffice), judged by the KL divergence from the dense model on calibration data, and put back. The
closest few are then held against uniform on data that the search did not see; one that is not closer there by more than two standard
errors of the paired differences (`errors_asked`: more where rows are few or tries many) does not count. A search that does not beat
uniform returns uniform and says so.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ..allocate import check_feasible
from ..engine import Settings, Trials, weights_key
from ..errors import ConfigError, DataError
from ..plan import Plan
from ..scores import alphas_folder, alphas_kept
from ..solvers import Solver, solver_from
from ..structure import Structure
from ..tasks import Batches
from ..version import __version__
from .assemble import found, sizes_of
from .base import check_sparsities
from .candidates import candidates
from .search import Hunt, Progress, Search
from .tried import Record


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
    minutes: float = (
        0.0  # start and score no candidate after that long (then the machine's speed decides, too); 0: try all
    )
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
        solver: Solver | None = None,
        settings: Settings | None = None,
        record: Path | None = None,
        progress: Progress | None = None,
    ) -> Search:
        """Try, judge, decide. The model holds its own weights afterwards.

        The last quarter of the batches is kept for the verdict. solver, settings: those of the run that will follow; None: the solver named
        here, at its defaults. record: a file that what was tried is written to; a search for the same thing goes on from it. Raises
        DataError for fewer than two batches; candidates that cannot be made are rows with the reason. Works in this process alone.
        """
        structure = found(model, structure)
        if data is None or len(data) < 2:
            raise DataError(
                "Auto needs calibration data (--data), two batches or more: it searches on some and decides on the others."
            )
        bounds = self.min_sparsity, self.max_sparsity
        check_feasible(sizes_of(structure), self.sparsity, *bounds)
        solver = solver or solver_from({"name": self.solver})
        settings = settings or Settings(seed=self.seed)
        unseen = max(1, len(data) // 4)
        seen = Batches(data[:-unseen], {**data.protocol, "part": "seen"})
        key = {
            "model": weights_key(model, structure),
            "search": repr({**asdict(self), "minutes": 0.0}),
            "solver": repr(solver),
            "propagate": settings.propagate,
            "data": seen.hash,
            "layerwise": __version__,
            "torch": torch.__version__,
        }
        with Record(record, key) as known, _exponents_kept():
            trials = Trials(model, structure, solver, seen, settings)
            made = Hunt(
                model, structure, trials, known, candidates(self), bounds, self.judged, self.minutes,
                seen, data[-unseen:], progress or _nobody,
            ).run()  # fmt: skip
        signed = Plan(method=self, solver=solver, layers={})  # the solver it was found for: another might not like it
        plan = made.plan.model_copy(update={"method": signed.method, "solver": signed.solver})
        return Search(plan, made.tried, made.verdict)


@contextmanager
def _exponents_kept() -> Iterator[None]:
    """Exponents of spectra are the same at every spread: where nobody keeps them, a folder does for as long as the search lasts."""
    if alphas_folder() is not None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder, alphas_kept(folder):
        yield


def _nobody(done: int, total: int, now: str) -> None:
    pass
