"""What a model is made of: stacks of blocks, layers with roles and sizes, and one view of every weight as matrices."""

from .cnn_channels import ChannelGroup, ChannelLayer, Channels, Run, cnn_channels, size_of
from .coupled import Coupling, Group, Part, coupled_groups, numbers_of
from .coupled_heads import shares_keys
from .factorable import factorable
from .find import structure_of
from .fused import fused_of
from .groups import Granularity, groups_of, towers_of
from .parts import Block, Kind, Layer, Stack, Structure
from .views import as_matrices, from_matrices, in_order, module_of, parameter_of

__all__ = [
    "Block",
    "ChannelGroup",
    "ChannelLayer",
    "Channels",
    "Coupling",
    "Granularity",
    "Group",
    "Kind",
    "Layer",
    "Part",
    "Run",
    "Stack",
    "Structure",
    "as_matrices",
    "cnn_channels",
    "coupled_groups",
    "factorable",
    "from_matrices",
    "fused_of",
    "groups_of",
    "in_order",
    "module_of",
    "numbers_of",
    "parameter_of",
    "shares_keys",
    "size_of",
    "structure_of",
    "towers_of",
]
