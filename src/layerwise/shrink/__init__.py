"""Treatments that change shapes: channels and heads cut out, whole blocks dropped, what a plan says of both."""

from .cut import Keep, shrink, zero_out

__all__ = ["Keep", "shrink", "zero_out"]
