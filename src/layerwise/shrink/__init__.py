"""Treatments that change shapes: channels and heads cut out, whole blocks dropped, what a plan says of both."""

from .apply import Applied, apply, changes_shapes, kept_by
from .cut import Keep, cut_units, shrink, zero_out
from .depth import drop_blocks
from .hidden import cut_hidden
from .narrow import GLOBAL_READS, REMOTE_MODULE, is_narrow, narrow, register, said_by_layer, settle, widths_of
from .uniform import uniform_widths

__all__ = [
    "GLOBAL_READS",
    "REMOTE_MODULE",
    "Applied",
    "Keep",
    "apply",
    "changes_shapes",
    "cut_hidden",
    "cut_units",
    "drop_blocks",
    "is_narrow",
    "kept_by",
    "narrow",
    "register",
    "said_by_layer",
    "settle",
    "shrink",
    "uniform_widths",
    "widths_of",
    "zero_out",
]
