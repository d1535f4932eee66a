"""How far a student's blocks are from its teacher's: the relative squared error of their raw outputs.

Outputs are taken at the blocks themselves: the last of transformers' `hidden_states` comes after the final norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..passes.rows import mask_of
from ..structure import structure_of
from ..tasks.batches import Batch


def relative_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 over the valid tokens, a float32 scalar. (..., width) twice, valid: bool (...).

    Raises ModelError where shapes differ.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"a block of the student gives {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: hidden states of other widths"
            " cannot be compared. Learn from the logits alone (hidden=0)."
        )
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    target = teacher.float()
    return (student.float() - target).square().sum() / target.square().sum().clamp_min(1e-30)


def block_pairs(
    student: nn.Module, teacher: nn.Module, original: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """(block of the student, block of the teacher that it came from), in the order of the student.

    original: block of the student -> that of the teacher; blocks that it does not name keep their name. Raises ConfigError for models
    without blocks, for names that are not there, and for a student of fewer blocks without `original`.
    """
    ours, theirs = ([block.name for block in structure_of(model).blocks] for model in (student, teacher))
    if not ours:
        raise ConfigError(f"{type(student).__name__} has no blocks whose outputs could be compared: leave hidden at 0.")
    if original is None and len(ours) != len(theirs):
        raise ConfigError(
            f"the student has {len(ours)} blocks, the teacher {len(theirs)}: say which came from which"
            ' (original={"student block": "teacher block"}).'
        )
    known, pairs = set(theirs), []
    for name in ours:
        other = (original or {}).get(name, name)
        if other not in known:
            raise ConfigError(f'block "{name}" of the student: the teacher has no block "{other}".')
        pairs.append((name, other))
    return pairs


@contextmanager
def outputs_of(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules give in the first forward pass within, by name; a recomputation by gradient checkpointing changes nothing."""
    found: dict[str, Tensor] = {}

    def kept(name: str, output: object) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(first, Tensor):
            raise ModelError(f'block "{name}" gives no tensor to compare: leave hidden at 0.')
        found.setdefault(name, first)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: kept(name, output))
        for name in blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def valid_tokens(model: nn.Module, batch: Batch, like: Tensor, block: str) -> Tensor | None:
    """True for tokens that are no padding, where the batch says so of what this block gives, of this shape; (batch, tokens) bool."""
    mask = mask_of(model, batch, block)
    if mask is None or mask.shape != like.shape[:2]:
        return None
    return mask.to(like.device).to(torch.bool)
