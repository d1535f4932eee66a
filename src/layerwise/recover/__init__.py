"""Training with and after compression: learning rates by layer, in a plain loop or in a stock trainer."""

from .temp_balance import TempBalance, learning_rates

__all__ = ["TempBalance", "learning_rates"]
