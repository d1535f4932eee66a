"""Treatments that change shapes: channels and heads cut out, whole blocks dropped, what a plan says of both."""

from .apply import Applied, apply, changes_shapes, kept_by
from .channels import shrink_channels, zero_channels
from .crop import crop, image_of, widths_in
from .cut import Keep, cut_units, shrink, zero_out
from .depth import drop_blocks
from .narrow import is_narrow, narrow, register, settle, widths_of

__all__ = [
    "Applied",
    "Keep",
    "apply",
    "changes_shapes",
    "crop",
    "cut_units",
    "drop_blocks",
    "image_of",
    "is_narrow",
    "kept_by",
    "narrow",
    "register",
    "settle",
    "shrink",
    "shrink_channels",
    "widths_in",
    "widths_of",
    "zero_channels",
    "zero_out",
]
