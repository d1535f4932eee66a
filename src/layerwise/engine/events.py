"""What the engine tells while it works. It never prints; the caller draws bars, writes a log, or stops."""

from dataclasses import dataclass


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
    zeros: int  # exact count in the new weight
    error: float | None  # ||(W - W') X||^2 over ||W X||^2, both summed over calibration tokens; None where unknown
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockFinished:
    """A block is done, and written to the work folder where there is one."""

    block: str
    index: int
    total: int
    seconds: float
    resumed: bool = False  # taken from the work folder, not solved again


Event = BlockStarted | LayerSolved | BlockFinished
