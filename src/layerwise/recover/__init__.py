"""Training with and after compression, in a plain loop or in a stock trainer: masks that hold, a teacher, learning rates by layer."""

from .distill import Distillation, distillation_loss
from .fit import fine_tune, warm_cosine
from .masks import Masks, hold, masks_of
from .start import kaiming_normal, random_masks
from .temp_balance import TempBalance, learning_rates

__all__ = [
    "Distillation",
    "Masks",
    "TempBalance",
    "distillation_loss",
    "fine_tune",
    "hold",
    "kaiming_normal",
    "learning_rates",
    "masks_of",
    "random_masks",
    "warm_cosine",
]
