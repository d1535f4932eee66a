"""What the engine tells while it works. It never prints; the caller draws bars, writes a log, or stops."""

from dataclasses import dataclass, field

from ..passes import Waiting
from ..solvers.codes import Codes
from ..solvers.factors import Factors


@dataclass(frozen=True)
class PassesWaiting:
    """Before the first block: what the calibration batches of this process will hold in memory while they wait."""

    waiting: Waiting


@dataclass(frozen=True)
class BlockStarted:
    """Work on this block begins."""

    block: str
    index: int  # of this block among all that are walked, from 0
    total: int


@dataclass(frozen=True)
class LayerSolved:
    """One layer has its new weight."""

    layer: str
    size: int
    zeros: int  # exact count in the new weight; in a quantized layer those that were pruned, since codes of 0 are no sparsity
    error: float | None = None  # ||(W - W') X||^2 over ||W X||^2, summed over calibration tokens; None where unknown
    tokens: int | None = None  # calibration tokens that reached it (the fewest over its experts); None without data
    notes: tuple[str, ...] = ()
    pruned: bool = True  # the plan prunes it: it counts in the budget of zeros
    bits: float | None = (
        None  # true bits per weight, scales and zeros, or factors, counted; None where it was only pruned
    )
    nominal_bits: int | None = None  # bits of its codes alone
    codes: Codes | None = field(default=None, repr=False, compare=False)  # on the CPU; its matrices row under row
    factors: Factors | None = field(default=None, repr=False, compare=False)  # on the CPU


@dataclass(frozen=True)
class BlockTuned:
    """A solved block was tuned to give what the dense one gave (`tuning.Tuner`).

    before, after: ||output - target||^2 over ||target||^2 on calibration batches that it was not tuned on. note: why it was left as it
    was solved, or empty.
    """

    block: str
    before: float
    after: float
    steps: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class BlockFinished:
    """A block is done, and written to the work folder where there is one."""

    block: str
    index: int
    total: int
    seconds: dict[str, float] = field(default_factory=dict)  # collect, solve, propagate, and tune where it was
    resumed: bool = False  # taken from the work folder, not solved again


Event = PassesWaiting | BlockStarted | LayerSolved | BlockTuned | BlockFinished
