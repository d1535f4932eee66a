"""What a unit costs: parameters, bytes, multiply-adds for a token, or time on this device; and what the whole model costs.

Time is a table that is measured once: every group's layers at full and at half width, each distinct shape once, and a line in between.
What else takes time is what is left of the whole forward pass. The model's time is measured again after it was cut: a table is no
promise.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ConfigError, ScoreError
from ..structure import Group, numbers_of, structure_of
from .watching import tell

KINDS = ("parameters", "bytes", "macs", "latency")
_PICO = 10**12
_TURNS = 15
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")  # what configs call the number of experts of a token


@dataclass(frozen=True)
class Costs:
    """total: of the model. units: group -> of one unit. Whole numbers: parameters, bytes, multiply-adds, picoseconds."""

    total: int
    units: dict[str, int]
    unit: str  # for people

    def words(self, amount: int) -> str:
        """So much in that unit; of time, in milliseconds."""
        return f"{amount / (_PICO // 1000):.3f}" if self.unit == "ms" else f"{amount:,}"


def costs_of(model: nn.Module, groups: Sequence[Group], kind: str, rows: int = 1) -> Costs:
    """rows: tokens in a forward pass whose time is taken. Raises ConfigError for a kind that is none, ScoreError where time cannot be
    measured (fused experts; models that do not take token ids)."""
    if kind == "parameters":
        return Costs(
            sum(p.numel() for p in model.parameters()), {g.name: numbers_of(model, g) for g in groups}, "parameters"
        )
    if kind == "bytes":
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        return Costs(total, {g.name: numbers_of(model, g) * _item(model, g) for g in groups}, "bytes")
    if kind == "macs":
        counted = [one for one in structure_of(model, include=["*"]).layers if one.kind not in ("embedding", "table")]
        tied = _head_is_tied(model)
        return Costs(
            sum(_active(model, one.size, one.shape) if one.kind == "experts" else one.size for one in counted) + tied,
            {g.name: _weights(model, g) for g in groups},
            "multiply-adds a token",
        )
    if kind == "latency":
        return _latencies(model, groups, rows)
    raise ConfigError(f'budget "{kind}": give {", ".join(KINDS[:-1])} or {KINDS[-1]}.')


def forward_time(model: nn.Module, rows: int) -> float:
    """Seconds of a forward pass of one sequence of `rows` tokens, the median of turns. Raises ScoreError for a model that takes no ids."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, rows, dtype=torch.long, device=device)
    was = model.training
    model.eval()
    try:
        return _median(lambda: model(input_ids=ids))
    except Exception as error:  # the model's own code
        line = (str(error).splitlines() or [""])[0]
        raise ScoreError(
            f"latency is measured on token ids, which {type(model).__name__} does not run on: {line}"
        ) from error
    finally:
        model.train(was)


def _latencies(model: nn.Module, groups: Sequence[Group], rows: int) -> Costs:
    if rows < 1:
        raise ConfigError(f"latency: rows={rows}: give the tokens of a forward pass, at least 1.")
    total = forward_time(model, rows)
    known: dict[tuple[object, ...], float] = {}
    found: dict[str, int] = {}
    for index, group in enumerate(groups):
        tell(index, len(groups), group.name)
        shape = tuple((tuple(model.get_parameter(one.parameter).shape), one.dim) for one in group.parts if one.scored)
        if shape not in known:
            known[shape] = _slope(model, group, rows)
        found[group.name] = max(0, round(known[shape] * _PICO))
    tell(len(groups), len(groups))
    return Costs(round(total * _PICO), found, "ms")


@torch.no_grad()
def _slope(model: nn.Module, group: Group, rows: int) -> float:
    """Seconds that a unit takes: the group's layers at full width less those at half."""
    whole = half = 0.0
    for part in (one for one in group.parts if one.scored):
        weight = model.get_parameter(part.parameter)
        if weight.ndim != 2 or not part.parameter.endswith(".weight"):
            raise ScoreError(
                f'"{group.name}": the time of fused experts is not measured. Give another budget, or leave them out.'
            )
        module = model.get_submodule(part.parameter.rpartition(".")[0])
        flat = weight.T if hasattr(module, "nf") else weight  # transformers' Conv1D
        axis = 1 - part.dim if hasattr(module, "nf") else part.dim
        fewer = flat.narrow(axis, 0, max(1, flat.shape[axis] // 2)).contiguous()
        for matrix, full in ((flat.contiguous(), True), (fewer, False)):
            spent = _median(_product(matrix, rows))
            whole, half = (whole + spent, half) if full else (whole, half + spent)
    return (whole - half) / (group.units / 2) if group.units > 1 else 0.0


def _product(matrix: Tensor, rows: int) -> Callable[[], object]:
    inputs = torch.ones(rows, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return lambda: linear(inputs, matrix)


@torch.no_grad()
def _median(run: Callable[[], object]) -> float:
    """Seconds of one run, after three that warm up."""
    times = []
    for turn in range(_TURNS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _item(model: nn.Module, group: Group) -> int:
    return model.get_parameter(group.parts[0].parameter).element_size()


def _weights(model: nn.Module, group: Group) -> int:
    """Weights that one unit takes along and a token meets, biases left out: each multiplies once for it."""
    total = 0
    for part in group.parts:
        if part.scored:
            shape = model.get_parameter(part.parameter).shape
            count = shape.numel() // shape[part.dim] * part.index.shape[1]
            total += _active(model, count, shape) if len(shape) == 3 else count
    return total


def _active(model: nn.Module, count: int, shape: Sequence[int]) -> int:
    """Of so many weights of fused experts, those that a token meets. Raises ScoreError where the config does not say how many it takes."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = next((n for name in _CHOSEN if isinstance(n := getattr(config, name, None), int)), None)
    if chosen is None:
        raise ScoreError(
            f"{type(model).__name__} does not say to how many experts a token goes: its multiply-adds are not known. Give another budget."
        )
    return count * min(chosen, shape[0]) // shape[0]


def _head_is_tied(model: nn.Module) -> int:
    """Weights of a head that shares the embedding's: they multiply, too."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    if head is None or inputs is None or getattr(head, "weight", None) is not getattr(inputs, "weight", None):
        return 0
    return int(head.weight.numel())
