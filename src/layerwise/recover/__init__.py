"""Training with and after compression, in a plain loop or in a stock trainer: masks that hold, learning rates by layer."""

from .masks import Masks, hold, masks_of
from .start import kaiming_normal, random_masks
from .temp_balance import TempBalance, learning_rates

__all__ = ["Masks", "TempBalance", "hold", "kaiming_normal", "learning_rates", "masks_of", "random_masks"]
