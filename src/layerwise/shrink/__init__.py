"""Treatments that change shapes: channels and heads cut out, whole blocks dropped, what a plan says of both."""

from .apply import Applied, apply, changes_shapes, kept_by
from .channels import shrink_channels, zero_channels
from .crop import crop, image_of, widths_in
from .cut import Keep, cut_units, shrink, zero_out
from .depth import can_drop, drop_blocks
from .hidden import cut_hidden
from .narrow import GLOBAL_READS, REMOTE_MODULE, is_narrow, narrow, register, said_by_layer, settle, widths_of
from .uniform import uniform_widths

__all__ = [
    "GLOBAL_READS",
    "REMOTE_MODULE",
    "Applied",
    "Keep",
    "apply",
    "can_drop",
    "changes_shapes",
    "crop",
    "cut_hidden",
    "cut_units",
    "drop_blocks",
    "image_of",
    "is_narrow",
    "kept_by",
    "narrow",
    "register",
    "said_by_layer",
    "settle",
    "shrink",
    "shrink_channels",
    "uniform_widths",
    "widths_in",
    "widths_of",
    "zero_channels",
    "zero_out",
]
