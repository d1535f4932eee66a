"""FLAP: how much what a unit's output weights read fluctuates around its mean (An et al. 2024, arXiv:2312.11983), and that mean.

A channel that hardly fluctuates can be replaced by a bias, its mean through the output weights. Mean and variance are exact over all
tokens, in float64, on the dense model in one pass; `running` is the official statistic, about tokens of a sequence times the variance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ScoreError
from ..structure import Group
from ..tasks.batches import Batch, call
from ..tasks.undisturbed import left_alone
from .watching import tell

KINDS = ("wifv", "ifv", "wifn")


@dataclass
class Moments:
    """Of each input of one layer, over tokens: float64 sums, and how many."""

    total: Tensor
    squares: Tensor
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """rows: (tokens, inputs)."""
        wide = rows.double()
        self.total += wide.sum(0).cpu()
        self.squares += wide.square().sum(0).cpu()
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """(inputs,) float64."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Population variance, (inputs,) float64."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


def running(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The official mean and fluctuation after sequences of (tokens, inputs): m_N = ((N - 1) m + mean) / N and
    v_N = v (N - 2) / (N - 1) + sum_t (z - m_N)^2 / N from the second on (its code updates m in place before it squares)."""
    mean, found = torch.zeros_like(sequences[0][0]), torch.zeros_like(sequences[0][0])
    for n, rows in enumerate(sequences, start=1):
        mean = ((n - 1) * mean + rows.mean(0)) / n
        if n > 1:
            found = found * (n - 2) / (n - 1) + (rows - mean).square().sum(0) / n
    return mean, found


def moments(model: nn.Module, data: Sequence[Batch], groups: Sequence[Group]) -> dict[str, Moments]:
    """Parameter that reads a group's units -> moments of its inputs, over all real tokens of all batches, of the model as it is.

    Raises ScoreError for fused experts, which are no modules of their own, and where no token came.
    """
    found: dict[str, Moments] = {}
    handles: list[RemovableHandle] = []
    mask: list[Tensor | None] = [None]
    for name in (_reader(group) for group in groups):
        module = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight"):
            raise ScoreError(
                f'"{name}" reads its inputs inside fused experts, where FLAP cannot look. Leave the experts out.'
            )
        width = model.get_parameter(name).shape[_dim(groups, name)]
        found[name] = Moments(torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
        handles.append(module.register_forward_pre_hook(_counting(found[name], mask)))
    try:
        with left_alone([model]), torch.no_grad():
            for index, batch in enumerate(data):
                tell(index, len(data), f"batch {index}")
                mask[0] = _real(batch)
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    tell(len(data), len(data))
    if empty := [name for name, one in found.items() if not one.count]:
        raise ScoreError(f'no token of the calibration data came to "{empty[0]}".')
    return found


def fluctuations(
    model: nn.Module,
    groups: Sequence[Group],
    seen: Mapping[str, Moments],
    kind: str = "wifv",
    *,
    square_heads: bool = True,
) -> dict[str, Tensor]:
    """Group -> score of each input entry that its units read, (units, entries) float32.

    wifv: variance times the squared norm of the weights that read it; ifv: the variance; wifn: mean |weight| times the root of the second
    moment. square_heads: those of attentions are squared, as the official code does.
    """
    found = {}
    for group in groups:
        name = _reader(group)
        one, part = seen[name], next(part for part in group.parts if part.parameter == name)
        weight = model.get_parameter(name).detach().double().cpu().movedim(part.dim, 0).flatten(1)
        if kind == "wifv":
            score = one.variance * weight.square().sum(1)
        elif kind == "ifv":
            score = one.variance
        else:
            score = weight.abs().mean(1) * (one.squares / one.count).sqrt()
        if group.kind == "heads" and square_heads:
            score = score.square()
        found[group.name] = score[part.index].float()
    return found


def _real(batch: Batch) -> Tensor | None:
    """True for tokens that are no padding, (batch, tokens); None where the batch does not say, or says it twice."""
    masks = [batch[name] for name in ("attention_mask", "decoder_attention_mask") if name in batch]
    return masks[0].bool() if len(masks) == 1 and masks[0].ndim == 2 else None


def _reader(group: Group) -> str:
    return next(part.parameter for part in group.parts if part.side == "in")


def _dim(groups: Sequence[Group], name: str) -> int:
    return next(part.dim for group in groups for part in group.parts if part.parameter == name and part.side == "in")


def _counting(into: Moments, mask: list[Tensor | None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach()
        real = mask[0]
        flat = rows.reshape(-1, rows.shape[-1])
        if real is not None and rows.shape[:2] == real.shape:
            flat = flat[real.to(rows.device).flatten()]
        into.add(flat)

    return hook
