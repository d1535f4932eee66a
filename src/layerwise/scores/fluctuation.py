"""FLAP: how much what a unit's output weights read fluctuates around its mean (An et al. 2024, arXiv:2312.11983), and that mean.

A channel that hardly fluctuates can be replaced by a bias, its mean through the output weights. Mean and variance are exact over all
tokens, in float64, on the dense model in one pass; `running` gives the official statistic instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ScoreError
from ..passes.rows import mask_of
from ..passes.wrapping import running as running_model
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

    @classmethod
    def of(cls, inputs: int) -> "Moments":
        """Of nothing yet."""
        return cls(torch.zeros(inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64))

    def meet(self, sequences: Sequence[Tensor]) -> None:
        """Each: (tokens, inputs)."""
        self.add(torch.cat(list(sequences)))

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
    def power(self) -> Tensor:
        """Mean of the square, (inputs,) float64."""
        return self.squares / self.count

    @property
    def variance(self) -> Tensor:
        """Population variance, (inputs,) float64."""
        return (self.power - self.mean.square()).clamp_min(0)


@dataclass
class Running:
    """The official statistic, one update for each sequence: m_N = ((N - 1) m + mean) / N, and from the second on
    v_N = v (N - 2) / (N - 1) + sum_t (z - m_N)^2 / N (its code updates m in place before it squares)."""

    mean: Tensor
    variance: Tensor  # as the code has it: about tokens of a sequence times the variance
    squares: Tensor
    count: int = 0
    sequences: int = 0

    @classmethod
    def of(cls, inputs: int) -> "Running":
        """Before any sequence. float64."""
        nothing = torch.zeros(inputs, dtype=torch.float64)
        return cls(nothing, nothing, nothing.clone())

    def meet(self, sequences: Sequence[Tensor]) -> None:
        """Each: (tokens, inputs)."""
        for rows in (one.double().cpu() for one in sequences if len(one)):
            self.sequences = n = self.sequences + 1
            self.mean = ((n - 1) * self.mean + rows.mean(0)) / n
            if n > 1:
                self.variance = self.variance * (n - 2) / (n - 1) + (rows - self.mean).square().sum(0) / n
            self.squares += rows.square().sum(0)
            self.count += len(rows)

    @property
    def power(self) -> Tensor:
        """Mean over sequences of the sum of squares."""
        return self.squares / self.sequences


Seen = Moments | Running
_S = TypeVar("_S", Moments, Running)


def moments(model: nn.Module, data: Sequence[Batch], groups: Sequence[Group]) -> dict[str, Moments]:
    """Parameter that reads a group's units -> moments of its inputs, over all real tokens of all batches, of the model as it is.

    Raises ScoreError for fused experts, which are no modules of their own, and where no token came.
    """
    return _seen(model, data, groups, Moments)


def running(model: nn.Module, data: Sequence[Batch], groups: Sequence[Group]) -> dict[str, Running]:
    """The same, the official statistic."""
    return _seen(model, data, groups, Running)


def _seen(model: nn.Module, data: Sequence[Batch], groups: Sequence[Group], kind: type[_S]) -> dict[str, _S]:
    found: dict[str, _S] = {}
    handles: list[RemovableHandle] = []
    batches: list[Batch] = []  # the one under way
    for group in groups:
        name = _reader(group)
        module = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight"):
            raise ScoreError(
                f'"{name}" reads its inputs inside fused experts, where FLAP cannot look. Leave the experts out.'
            )
        width = model.get_parameter(name).shape[_dim(group)]
        found[name] = kind.of(width)
        handles.append(module.register_forward_pre_hook(_counting(found[name], model, batches, group.block)))
    try:
        with left_alone([model]), torch.no_grad():
            for index, batch in enumerate(data):
                tell(index, len(data), f"batch {index}")
                batches[:] = [batch]
                with running_model(index):
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
    seen: Mapping[str, Seen],
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
            score = weight.abs().mean(1) * one.power.sqrt()
        if group.kind == "heads" and square_heads:
            score = score.square()
        found[group.name] = score[part.index].float()
    return found


def _reader(group: Group) -> str:
    return next(part.parameter for part in group.parts if part.side == "in")


def _dim(group: Group) -> int:
    return next(part.dim for part in group.parts if part.side == "in")


def _counting(
    into: Seen, model: nn.Module, batches: list[Batch], block: str
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach()
        mask = mask_of(model, batches[0], block)
        if mask is None or mask.ndim != 2 or rows.shape[:-1] not in (mask.shape, mask.flatten().shape):
            into.meet(list(rows.reshape(-1, *rows.shape[-2:])))
            return
        sequences = rows.reshape(*mask.shape, rows.shape[-1])  # OPT hands its MLP all tokens in a row
        into.meet([one[real] for one, real in zip(sequences, mask.to(rows.device).bool(), strict=True)])

    return hook
