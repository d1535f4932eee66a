"""A pruned or quantised model in the form in which it runs fastest here: measured, layer by layer, and said so."""

from .choosing import fastest
from .conv import NarrowConv2d
from .forms import BsrLinear, CsrLinear, Form, NarrowLinear, TwoFourLinear
from .gather import GatherLinear
from .int8 import Int8Linear, int8_on_cpu
from .report import LayerSpeed, SpeedReport
from .weight_only import Int4Linear, Int8WeightLinear
from .zeros import Zeros, zeros_of

__all__ = [
    "BsrLinear",
    "CsrLinear",
    "Form",
    "GatherLinear",
    "Int4Linear",
    "Int8Linear",
    "Int8WeightLinear",
    "LayerSpeed",
    "NarrowConv2d",
    "NarrowLinear",
    "SpeedReport",
    "TwoFourLinear",
    "Zeros",
    "fastest",
    "int8_on_cpu",
    "zeros_of",
]
