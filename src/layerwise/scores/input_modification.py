"""LIM, how far a block turns what goes into it: a score of Layer-Wise Quantization (Dumitru et al. 2024, arXiv:2406.17415)."""

from torch import Tensor, nn

from ..errors import ModelError
from ..structure import Stack, Structure
from ..structure.weights import is_norm
from ..tasks.batches import Batches
from .block_influence import mean_turn, turns


def negative_cosine(before: Tensor, after: Tensor) -> float:
    """- mean over tokens of the cosine between `before` and `after`, both (tokens, hidden), float32; in [-1, 1], high = keep.

    Token by token: of all tokens as one long vector the few with huge norms would decide. A row of zeros has cosine 0.
    Raises ScoreError if a value is not finite, or there are no rows.
    """
    return mean_turn(before, after) - 1


def input_modification(
    model: nn.Module, data: Batches, structure: Structure, *, final_norm: bool = False
) -> dict[str, float]:
    """Block name -> LIM on the dense model, one forward pass, padding left out; high = keep. Block influence less 1.

    final_norm: what leaves the last block of a stack is taken after the norm behind the stack, as in the `hidden_states` that models
    return; the authors' code for a sibling paper reads those, which lifts the score of the last block.
    Raises ModelError if a stack has no norm behind it, and what `turns` raises.
    """
    through = {stack.blocks[-1].name: _norm_behind(model, stack) for stack in structure.stacks} if final_norm else {}
    return {name: turn - 1 for name, turn in turns(model, data, structure, through).items()}


def _norm_behind(model: nn.Module, stack: Stack) -> nn.Module:
    """The first norm beside the stack that comes after it in the model."""
    path, _, own = stack.name.rpartition(".")
    beside = list(model.get_submodule(path).named_children())
    names = [name for name, _ in beside]
    behind = [module for _, module in beside[names.index(own) + 1 :] if is_norm(module)] if own in names else []
    if not behind:
        raise ModelError(
            f'input_modification: no norm stands behind the blocks of "{stack.name}". Leave final_norm off.'
        )
    return behind[0]
