"""Turn a model into its fastest form on the device at hand: try, measure, keep what is faster, say what was done and why.

Every layer with zeros or codes races its possible forms against the dense one on inputs of the size that it really gets. Only a form that
wins by a margin is taken, and whole forward passes have the last word: what does not make the model faster is given back.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError, SelectionError
from ..io.load import check_finite
from ..solvers.codes import Codes
from ..tasks.batches import Batch
from ..tasks.undisturbed import undisturbed
from .candidates import Candidates, for_convolution, for_matrix
from .forms import Form
from .judging import Decided, judged
from .layers import Seen, head_of, inputs_of, seen_in_a_pass
from .outputs import layer_limit, relative_error
from .report import LayerSpeed, SpeedReport, line_of
from .timing import MARGIN, Run, Timed, race

WHOLE = 10  # times what the race of a layer may take, for that of the model

Progress = Callable[[int, int, str], None]  # layers done, layers in all, the one being timed


def fastest(
    model: nn.Module,
    inputs: Batch | Tensor | None = None,
    *,
    batch: int = 1,
    length: int = 1,
    device: str | torch.device | None = None,
    codes: Mapping[str, Codes] | None = None,
    rounding: bool = False,
    exclude: Iterable[str] = (),
    margin: float = MARGIN,
    seconds: float = 0.2,
    progress: Progress | None = None,
) -> tuple[nn.Module, SpeedReport]:
    """(the model in its fastest form, what was done with each layer). `model` stays as it was; what stays dense is shared with it.

    inputs: what one forward pass will get, of the batch size that matters: keyword tensors, or the first argument. Without, a
    language model gets `batch` sequences of `length` tokens; the default is one step of decoding. device: the model goes there first.
    codes: layer -> codes of its weight, where it was quantised (`Result.codes`, or `packed_codes` of a saved folder): such layers also
    try kernels that multiply codes. rounding: also int8 with rounded inputs, near the dense model and not equal; never for the head.
    exclude: globs of layers that stay dense. margin: how much faster than dense a form must be. seconds: about what the race of one
    layer takes.

    The result is for inference, on this device and in this dtype; its modules know no gradients. Outputs equal those of the dense model
    within the rounding of the dtype, or the model is left dense.
    `inputs` go through the model many times: hooks that it has as a whole are called each time. A layer with hooks of its own stays dense.
    Raises ModelError (weights not finite or not in memory; it is not known what the model takes), SelectionError (a glob that
    matches nothing), ConfigError.
    """
    if batch < 1 or length < 1 or seconds <= 0 or margin < 0:
        raise ConfigError(
            f"fastest: batch={batch}, length={length}, seconds={seconds}, margin={margin}: sizes from 1, seconds above 0, margin from 0."
        )
    _check(model)
    if device is not None:
        model.to(device)
    given = inputs_of(model, inputs, batch, length)
    with undisturbed([model]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        layers = seen_in_a_pass(model, given)
        stay = _excluded(layers, exclude)
        head, size = head_of(model), sum(one.numel() * one.element_size() for one in model.parameters())
        decided = []
        for done, layer in enumerate(layers):
            if progress is not None:
                progress(done, len(layers), layer.name)
            reason = "excluded" if layer.name in stay else layer.why_not()
            if reason is None:
                reason = layer.mixed() if layer.rows else "the pass did not call it"
            if reason is not None:
                decided.append(Decided(layer, replace(_dense(layer), why=reason), None))
                continue
            found = _candidates(layer, (codes or {}).get(layer.name), rounding and layer.module is not head)
            decided.append(_decide(layer, found, margin, seconds, size))
        if progress is not None:
            progress(len(layers), len(layers), "the whole model")
        return judged(model, given, decided, margin, WHOLE * seconds)


def _check(model: nn.Module) -> None:
    devices = {parameter.device.type for parameter in model.parameters()}
    if not devices:
        raise ModelError("fastest: the model has no parameters.")
    if "meta" in devices:
        raise ModelError(
            "fastest: weights of this model are not in memory (streamed, or on the meta device). Load it whole."
        )
    check_finite(model)


def _excluded(layers: list[Seen], globs: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for glob in globs:
        matched = {layer.name for layer in layers if fnmatchcase(layer.name, glob)}
        if not matched:
            raise SelectionError(f'fastest: exclude "{glob}" matches no layer of the model.')
        found |= matched
    return found


def _candidates(layer: Seen, codes: Codes | None, rounding: bool) -> Candidates:
    module = layer.module
    if isinstance(module, nn.Conv2d):
        return for_convolution(module)
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)  # noqa: S101  (for the type checker)
    return for_matrix(layer.matrix, bias, codes=codes, rounding=rounding)


def _decide(layer: Seen, found: Candidates, margin: float, seconds: float, size: int) -> Decided:
    """The race of one layer among the forms that it could take. size: bytes of the whole model."""
    dense = replace(_dense(layer), density=found.density, looks=found.looks, refused=found.refused)
    if not found.builds:
        why = "no zeros" if found.density == 1 else f"{found.density:.0%} kept: no form for that"
        return Decided(layer, replace(dense, why=why), None)
    x = layer.input()
    try:
        exact = layer.module(x)
    except Exception as error:
        return Decided(layer, replace(dense, why=f"it does not run by itself ({line_of(error)})"), None)
    built, errors, failed = _built(found, layer, x, exact)
    dense = replace(dense, refused={**found.refused, **failed})
    if not built:
        why = "; ".join(f"{name} {reason}" for name, reason in failed.items())
        return Decided(layer, replace(dense, why=why), None)
    runs: dict[str, Run] = {"dense": partial(layer.module, x)}
    runs |= {name: partial(form, x) for name, form in built.items()}
    others = size - dense.dense_bytes if x.device.type == "cpu" else 0
    return _won(layer, dense, race(runs, seconds=seconds, others=others), built, errors, margin)


def _won(
    layer: Seen,
    dense: LayerSpeed,
    times: dict[str, Timed],
    built: Mapping[str, Form],
    errors: Mapping[str, float],
    margin: float,
) -> Decided:
    tried = {name: times[name].ratio for name in sorted(built, key=lambda name: -times[name].ratio)}
    dense = replace(dense, dense_ms=times["dense"].ms, tried=tried)
    others = [f"{name} {ratio:.2f}" for name, ratio in tried.items()]
    winners = [name for name in tried if times[name].faster(margin)]
    if not winners:
        best = next(iter(tried))
        noise = f", within noise (margin {margin:.0%})" if tried[best] >= 1 else ""
        why = f"{best} is {tried[best]:.2f} times as fast{noise}; tried {', '.join(others)}"
        return Decided(layer, replace(dense, ms=dense.dense_ms, ratio=1.0, why=why), None)
    won = winners[0]
    record = replace(
        dense, form=won, why=f"fastest of {', '.join(others)}" if len(others) > 1 else "faster than dense",
        ms=times[won].ms, ratio=tried[won], error=errors[won], bytes=built[won].bytes,
    )  # fmt: skip
    return Decided(layer, record, built[won])


def _dense(layer: Seen) -> LayerSpeed:
    """The record of a layer that stays as it is, without times."""
    size = layer.parameter.numel() * layer.parameter.element_size()
    kept = int(torch.count_nonzero(layer.parameter)) / max(1, layer.parameter.numel())
    return LayerSpeed(
        name=layer.name, kind=layer.kind, shape=tuple(layer.parameter.shape), density=kept, looks=f"{kept:.1%} kept",
        form="dense", why="", rows=layer.rows, dense_bytes=size, bytes=size,
    )  # fmt: skip


def _built(
    found: Candidates, layer: Seen, x: Tensor, exact: Tensor
) -> tuple[dict[str, Form], dict[str, float], dict[str, str]]:
    """Forms that work here and equal the dense layer, with their errors; and why the others do not."""
    turned = layer.kind == "conv1d"
    built: dict[str, Form] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, build in found.builds.items():
        try:
            form = build()
            form.turned = turned
            errors[name] = relative_error(form(x), exact)
        except Exception as error:  # kernels refuse in many ways: no compiler, no such dtype, no memory
            failed[name] = f"cannot run here ({line_of(error)})"
            continue
        limit = layer_limit(name, exact.dtype)
        if errors[name] <= limit:
            built[name] = form
        else:
            failed[name] = f"its outputs differ by {errors[name]:.2g}, more than {limit:.2g}"
    return built, errors, failed
