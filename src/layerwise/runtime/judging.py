"""The last word: whole forward passes of the model with the forms that its layers won with, beside the dense one."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..tasks.batches import Batch, call
from .forms import Form
from .layers import Seen
from .outputs import ROUNDING, first_tensor, relative_error, whole_limit
from .report import LayerSpeed, SpeedReport, line_of
from .timing import Run, race

STRONG = 1.3  # where the whole is not faster with all forms, it is tried with those that were this much faster alone
NOTHING = "No layer has a form that is faster than dense."
NEAR, SAME = "Outputs are near the dense ones, not equal (int8).", "Outputs equal the dense ones."


@dataclass(frozen=True)
class Decided:
    """What the race of one layer came to; form None: dense."""

    layer: Seen
    record: LayerSpeed
    form: Form | None

    def given_back(self) -> "Decided":
        """The same left dense, because the whole was not faster with it."""
        one = self.record
        why = f"{one.form} is {one.ratio:.2f} times as fast alone; with it the whole was not faster"
        dense = replace(one, form="dense", why=why, ms=one.dense_ms, ratio=1.0, error=None, bytes=one.dense_bytes)
        return replace(self, record=dense, form=None)


def judged(
    model: nn.Module, given: Batch, decided: Sequence[Decided], margin: float, seconds: float
) -> tuple[nn.Module, SpeedReport]:
    """The model with all forms; or with the strong ones; or dense, where neither makes whole passes faster or outputs are not equal."""
    facts = protocol_of(model, given, margin)
    if all(one.form is None for one in decided):
        return with_forms(model, []), SpeedReport(_records(decided), NOTHING, protocol=facts)
    exact = first_tensor(call(model, given))
    why = ""
    for chosen in _attempts(decided):
        fast = with_forms(model, chosen)
        try:
            got = first_tensor(call(fast, given))
        except Exception as failure:  # a model may do with its layers what only the dense ones can
            why = f"All dense: with these forms the model does not run ({line_of(failure)})."
            continue
        error = relative_error(got, exact)
        rounds = any(one.record.form in ROUNDING for one in chosen)
        if not error <= whole_limit(rounds, exact.dtype):
            why = f"All dense: with these forms the model's outputs differ by {error:.2g}."
            continue
        passes: dict[str, Run] = {"dense": partial(call, model, given), "fast": partial(call, fast, given)}
        times = race(passes, seconds=seconds, to_the_end=True)
        whole = times["fast"]
        if whole.ratio > 1:
            why = NEAR if rounds else SAME
            figures = times["dense"].ms, whole.ms, whole.ratio, whole.low, error
            return fast, SpeedReport(_records(chosen), why, *figures, protocol=facts)
        why = (
            f"All dense: with these forms a whole pass is {whole.ratio:.2f} times as fast, whatever layers gain alone."
        )
    back = [one if one.form is None else one.given_back() for one in decided]
    return with_forms(model, []), SpeedReport(_records(back), why, protocol=facts)


def _attempts(decided: Sequence[Decided]) -> list[list[Decided]]:
    strong = [one if one.form is None or (one.record.ratio or 0) >= STRONG else one.given_back() for one in decided]
    differs = any(one.form is not two.form for one, two in zip(strong, decided, strict=True))
    return [list(decided), *([strong] if differs and any(one.form for one in strong) else [])]


def _records(decided: Sequence[Decided]) -> tuple[LayerSpeed, ...]:
    return tuple(one.record for one in decided)


def with_forms(model: nn.Module, decided: Sequence[Decided]) -> nn.Module:
    """A model of its own modules and the same tensors, with these layers' forms in place."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    fast = copy.deepcopy(model, shared)
    for one in decided:
        if one.form is not None:
            for path in one.layer.paths:
                if not path:
                    return one.form.eval()  # the model is this layer
                fast.set_submodule(path, one.form)
    return fast.eval()


def protocol_of(model: nn.Module, given: Batch, margin: float) -> dict[str, str | int | float | bool]:
    """What belongs beside every time: device, dtype, threads, what went through the model, the version of torch."""
    device = next(model.parameters()).device
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters() if one.is_floating_point()})
    shapes = ", ".join(f"{name} {' × '.join(map(str, value.shape))}" for name, value in given.items())
    return {
        "device": f"{device.type}{card}",
        "dtype": "+".join(dtypes),
        "threads": torch.get_num_threads(),
        "inputs": shapes,
        "margin": margin,
        "torch": str(torch.__version__),
        # on a machine that is busier than it has cores, times of several threads say little
        **({"load": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}),
    }
