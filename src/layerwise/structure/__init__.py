"""What a model is made of: stacks of blocks, layers with roles and sizes, and one view of every weight as matrices."""

from .factorable import factorable
from .find import structure_of
from .fused import fused_of
from .groups import Granularity, groups_of, towers_of
from .parts import Block, Kind, Layer, Stack, Structure
from .views import as_matrices, from_matrices, in_order, module_of, parameter_of

__all__ = [
    "Block",
    "Granularity",
    "Kind",
    "Layer",
    "Stack",
    "Structure",
    "as_matrices",
    "factorable",
    "from_matrices",
    "fused_of",
    "groups_of",
    "in_order",
    "module_of",
    "parameter_of",
    "structure_of",
    "towers_of",
]
