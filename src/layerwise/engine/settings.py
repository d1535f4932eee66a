"""How the walk is done; what is done is in the plan and the solver."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError
from .work import Work

Propagate = Literal["compressed", "dense"]


@dataclass(frozen=True)
class Settings:
    """How the walk is done; what is done is in the plan and the solver.

    device: where each block is for its turn; None: where the model is. work: a folder that finished blocks are written to, and from
    which a killed run goes on; a `Work` that is entered already stays the caller's. seed: of solvers that draw. alone: do all of it in
    this process, also under torchrun. spill: a folder for files in which calibration batches keep their activations while they wait
    (the model must be on the CPU; its blocks may go to a device); None: in memory. The result is the same to the bit.
    """

    propagate: Propagate = "compressed"
    device: torch.device | None = None
    work: str | Work | None = None
    seed: int = 0
    alone: bool = False
    spill: str | None = None

    def __post_init__(self) -> None:
        if self.propagate not in ("compressed", "dense"):
            raise ConfigError(f'propagate="{self.propagate}": give "compressed" or "dense".')
