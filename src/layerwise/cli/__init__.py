"""The `layerwise` command: results on standard output, progress and errors on standard error."""

from .guard import main

__all__ = ["main"]
