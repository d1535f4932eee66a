"""Block-wise reconstruction: each compressed block is tuned for a few steps to give what the dense block gave, before the walk goes on.

    lw.compress(model, plan, solver=Wanda(), data=data, tuner=Reconstruction())

One block is in memory with what trains it, whatever the depth of the model; nothing passes through the model's head. Pruned weights
stay zero, codes stay as they are and their scales move, factors keep their pattern. By default a block sees what the compressed blocks
before it give and learns what the dense model gives at this depth, so that it makes up for their errors, too (BRECQ, Li et al. 2021,
arXiv:2102.05426, tunes block by block; AdaRound, Nagel et al. 2020, arXiv:2004.10568, has the asymmetric target). Its state with the
lowest error on batches that it was not tuned on is kept: the solver's own may be it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..engine import BlockTuned, LayerSolved, SolvedBlock
from ..errors import ConfigError, DataError
from ..randomness import generator_for
from ..structure import parameter_of
from ..tasks.batches import Batches
from .fit import warm_cosine
from .forms import Form, form_of, put_back, values_of
from .hidden import relative_error, valid_tokens


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are tuned: Adam over `epochs` of the calibration batches, a batch a step, warm-up and a cosine.

    target: "dense", or "same": what the dense block gives for the very inputs that the compressed one gets (half the activations).
    """

    epochs: int = 4
    lr: float = 1e-3  # of weights
    ratio_lr: float = 1e-2  # of the logarithms of scales, and of shifts in steps of the grid
    target: Literal["dense", "same"] = "dense"
    held_out: float = 0.125  # share of the batches that judge, at least one
    patience: int = 2  # epochs without a lower error that end a block
    seed: int = 0

    def __post_init__(self) -> None:
        bad = {
            "epochs": self.epochs < 1 and "at least 1",
            "lr": not 0 < self.lr < math.inf and "above 0",
            "ratio_lr": not 0 < self.ratio_lr < math.inf and "above 0",
            "target": self.target not in ("dense", "same") and '"dense" or "same"',
            "held_out": not 0 < self.held_out < 1 and "a share of the batches, 0 < held_out < 1",
            "patience": self.patience < 1 and "at least 1",
        }
        if name := next((name for name, right in bad.items() if right), None):
            raise ConfigError(f"Reconstruction: {name}={getattr(self, name)!r}: give {bad[name]}.")

    def facts(self) -> dict[str, Any]:
        """See `Tuner.facts`."""
        return {"name": "reconstruction", **asdict(self)}

    def check(self, model: nn.Module, data: Batches) -> None:
        """Raise before any work: DataError for fewer than two batches, ConfigError for float16 weights."""
        if len(data) < 2:
            raise DataError(
                f"reconstruction tunes on some batches and judges by others; there is {len(data)}. Give more samples, or smaller batches"
                " (--batch)."
            )
        if any(one.dtype == torch.float16 for one in model.parameters()):
            raise ConfigError(
                "reconstruction: gradients are lost in float16. Load the model in bfloat16 or float32 (--dtype)."
            )

    def tune(self, block: SolvedBlock) -> tuple[list[LayerSolved], BlockTuned]:
        """See `Tuner.tune`."""
        started = time.perf_counter()
        forms, places = _forms(block)
        judging = min(max(1, round(self.held_out * len(block.passes))), len(block.passes) - 1)  # one is left to tune on
        training = list(range(len(block.passes) - judging))
        judged = range(len(training), len(block.passes))
        error = before = _mean_error(block, forms, judged)
        best, steps, note = values_of(forms), 0, ""
        draw = generator_for(self.seed, f"reconstruction:{block.name}")
        optimizer = self._optimizer(forms)
        schedule = warm_cosine(optimizer, self.epochs * len(training))
        worse = 0
        for _ in range(self.epochs):
            if not math.isfinite(error) or worse == self.patience:
                break
            for place in torch.randperm(len(training), generator=draw).tolist():
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    _error(block, forms, training[place]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                steps += 1
            found = _mean_error(block, forms, judged)
            if not math.isfinite(found):
                note = f"the error was {found} after {steps} steps: lower lr"
                break
            if found < error:
                error, best, worse = found, values_of(forms), 0
            else:
                worse += 1
        if not error < before:
            note = note or ("the dense block's output is not finite" if not math.isfinite(before) else "no step helped")
            return list(block.events), BlockTuned(
                block.name, before, before, steps, time.perf_counter() - started, f"left as it was solved: {note}"
            )
        put_back(forms, best)
        events = _written(block, forms, places)
        return events, BlockTuned(block.name, before, error, steps, time.perf_counter() - started)

    def _optimizer(self, forms: dict[str, Form]) -> torch.optim.Optimizer:
        groups = [
            {"params": [leaf for form in forms.values() for leaf in form.leaves], "lr": self.lr},
            {"params": [leaf for form in forms.values() for leaf in form.ratios], "lr": self.ratio_lr},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]])


def _forms(block: SolvedBlock) -> tuple[dict[str, Form], dict[str, str]]:
    """Parameter name within the block -> its form, and layer -> parameter name.

    Of tied parameters those that other blocks use stay out, and so do layers that an earlier run has put on a grid, whose codes are not at
    hand here.
    """
    events = {event.layer: event for event in block.events}
    solved = {id(parameter_of(block.model, layer)): layer for layer in block.layers}
    within = {id(parameter) for parameter in block.module.parameters()}
    outside = {
        id(parameter)
        for name, parameter in block.model.named_parameters(remove_duplicate=False)
        if id(parameter) in within and not name.startswith(f"{block.name}.")
    }
    on_grid = {*getattr(block.model, "layerwise_quantized", ())}
    forms: dict[str, Form] = {}
    places: dict[str, str] = {}
    for name, parameter in block.module.named_parameters():
        layer, full = solved.get(id(parameter)), f"{block.name}.{name}"
        if not parameter.is_floating_point() or id(parameter) in outside:
            continue
        if layer is None and on_grid & {full, full.rpartition(".")[0]}:
            continue
        forms[name] = form_of(parameter, layer, None if layer is None else events[layer.name])
        if layer is not None:
            places[layer.name] = name
    return forms, places


def _error(block: SolvedBlock, forms: dict[str, Form], index: int) -> Tensor:
    """The relative squared error of one pass, the mean over what the block hands on; a scalar, differentiable in what is trained."""
    args, kwargs = block.inputs(index)
    weights = {name: form.weight() for name, form in forms.items()}
    found = block.outputs(functional_call(block.module, weights, args, kwargs))
    batch, targets = block.batch(index), block.target(index)
    errors = [
        relative_error(one, wanted, valid_tokens(block.model, batch, wanted, block.name))
        for one, wanted in zip(found, targets, strict=True)
    ]
    return torch.stack(errors).mean()


@torch.no_grad()
def _mean_error(block: SolvedBlock, forms: dict[str, Form], passes: Sequence[int]) -> float:
    return sum(float(_error(block, forms, index)) for index in passes) / len(passes)


@torch.no_grad()
def _written(block: SolvedBlock, forms: dict[str, Form], places: dict[str, str]) -> list[LayerSolved]:
    """Put the weights into the block; the events of its layers, as they are now."""
    parameters, weights = dict(block.module.named_parameters()), {name: form.weight() for name, form in forms.items()}
    for name, weight in weights.items():
        parameters[name].data.copy_(weight)
    return [
        forms[places[event.layer]].event(event, weights[places[event.layer]]) if event.layer in places else event
        for event in block.events
    ]
