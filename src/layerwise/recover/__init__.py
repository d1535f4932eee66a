"""Training with and after compression: masks held while a model is trained, by a plain loop or by a stock trainer."""

from .masks import Masks, hold, masks_of
from .start import kaiming_normal, random_masks

__all__ = ["Masks", "hold", "kaiming_normal", "masks_of", "random_masks"]
