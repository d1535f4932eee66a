"""Training with and after compression, in a plain loop or a stock trainer: masks, a teacher, learning rates by layer, blocks in turn."""

from .adapters import KINDS as ADAPTERS
from .adapters import add_adapter, load_adapter, merge_adapter, save_adapter
from .distill import Distillation, distillation_loss
from .draw import inclusion
from .fit import fine_tune, warm_cosine
from .groups import parameter_groups, probabilities_of, rates_of
from .hidden import relative_error
from .low_rank import LowRank, LowRankAdam
from .masks import Masks, hold, masks_of
from .reconstruct import Reconstruction
from .recovery import Recovered, Recovery
from .sampling import LayerSampling
from .start import kaiming_normal, random_masks
from .temp_balance import TempBalance, learning_rates

__all__ = [
    "ADAPTERS",
    "Distillation",
    "LayerSampling",
    "LowRank",
    "LowRankAdam",
    "Masks",
    "Reconstruction",
    "Recovered",
    "Recovery",
    "TempBalance",
    "add_adapter",
    "distillation_loss",
    "fine_tune",
    "hold",
    "inclusion",
    "kaiming_normal",
    "learning_rates",
    "load_adapter",
    "masks_of",
    "merge_adapter",
    "parameter_groups",
    "probabilities_of",
    "random_masks",
    "rates_of",
    "relative_error",
    "save_adapter",
    "warm_cosine",
]
