"""How heavy the tail of a layer's spectrum is: the Hill exponent alpha of AlphaPruning, FARMS and TempBalance.

Sources: Lu et al. 2024, arXiv:2410.10912 (AlphaPruning: whole matrices); FARMS, ICML 2025 (windows of one shape); Zhou et al. 2023,
arXiv:2312.00359 (TempBalance). Small alpha: a heavy tail, trained well: **low = keep**; methods turn the sign. Weights alone: no data,
no gradients, no forward pass. The kernels are in `spectra.py` and `tail_fit.py`; here is what puts them together for a layer, and the walk.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ScoreError
from ..passes import weight_at_hand
from ..structure import Layer, Structure, as_matrices
from .alpha_cache import alphas_folder, fingerprint_of, keep, recall
from .spectra import TINY, Windows, blurred, slice_spectra, spectrum, window_spectrum
from .tail_fit import Fit, TailFit, fit_tail
from .watching import tell

FEWEST = 5  # eigenvalues without which a layer is skipped, as in FARMS; TempBalance asks for 50
FARMS = Windows()
_FORM = 2  # of the computation: another number makes every alpha that was kept a stranger


@dataclass(frozen=True)
class Look:
    """Which spectrum is fitted, and how. windows None: of whole matrices, as AlphaPruning and TempBalance; else as FARMS."""

    windows: Windows | None = FARMS
    fit: Fit = "peak"
    fewest: int = FEWEST


@dataclass(frozen=True)
class LayerTail:
    """One layer's exponent, None where it has none; `note` says why, or what was done otherwise than asked.

    spectra: what was fitted, each ascending, with its fit beside it; several for a convolution in windows, whose alpha is the mean. Empty
    where alpha was kept from before.
    """

    name: str
    alpha: float | None
    note: str = ""
    spectra: tuple[Tensor, ...] = ()
    fits: tuple[TailFit, ...] = ()


def alpha_hill(
    model: nn.Module, structure: Structure, look: Look | None = None, cache: str | Path | None = None
) -> dict[str, float]:
    """Layer name -> alpha, > 1; **low = keep**. Layers that have none (too small, zero, of rank one) are not in the result.

    Raises ScoreError naming the layer if a weight is not finite. cache: as for `layer_tails`.
    """
    tails = layer_tails(model, structure, look, cache)
    return {tail.name: tail.alpha for tail in tails if tail.alpha is not None}


def layer_tails(
    model: nn.Module,
    structure: Iterable[Layer],
    look: Look | None = None,
    cache: str | Path | None = None,
    *,
    spectra: bool = False,
) -> Iterator[LayerTail]:
    """Each layer of `structure`, or of a list of layers, in that order, one weight in memory at a time where the model is streamed.

    cache: a folder of alphas computed before (None: the one of `alphas_kept`, or none). spectra: compute them in any case, for pictures.
    """
    look = look or Look()
    folder = alphas_folder() if cache is None else Path(cache)
    layers, problem = tuple(structure), ""
    for done, layer in enumerate(layers):
        tell(done, len(layers), layer.name)
        weight = weight_at_hand(model, layer.parameter)
        key = fingerprint_of(weight, _facts(layer, look)) if folder is not None else ""
        kept = recall(folder, key) if folder is not None and not spectra else None
        if kept is not None:
            yield LayerTail(layer.name, kept["alpha"], kept["note"])
            continue
        tail = layer_tail(weight, layer, look)
        if folder is not None and not problem:  # one note is enough, and so is one attempt
            problem = keep(folder, key, {"alpha": tail.alpha, "note": tail.note})
            tail = replace(tail, note="; ".join(filter(None, (tail.note, problem))))
        yield tail
    tell(len(layers), len(layers))


def layer_tail(weight: Tensor, layer: Layer, look: Look) -> LayerTail:
    """The exponent of one weight of the stored shape. A layer without one says so in its note, and has alpha None.

    float32 where only the upper half of the spectrum counts ("mid") and is sharp in it, else float64: the smallest eigenvalue sets the
    bins of "peak". Raises ScoreError naming the layer if the weight is not finite.
    """
    if weight.device.type == "mps":  # it has neither float64 nor eigenvalues
        weight = weight.cpu()
    try:
        if look.fit == "mid" and weight.dtype != torch.float64:
            found, note = layer_spectra(weight, layer, look.windows, torch.float32)
            if any(blurred(values) for values in found):
                found, note = layer_spectra(weight, layer, look.windows)
        else:
            found, note = layer_spectra(weight, layer, look.windows)
    except ScoreError as error:
        raise ScoreError(f'layer "{layer.name}": {error}') from error
    if min(map(len, found)) < look.fewest:
        return LayerTail(layer.name, None, f"no alpha: {min(map(len, found))} eigenvalues, fewer than {look.fewest}")
    real = min(int((values > TINY * values[-1]).sum()) for values in found)
    if 1 < real < look.fewest:  # of fewer `fit_tail` speaks
        return LayerTail(layer.name, None, f"no alpha: {real} eigenvalues that are not zero, fewer than {look.fewest}")
    try:
        fits = tuple(fit_tail(values, look.fit) for values in found)
    except ScoreError as error:
        return LayerTail(layer.name, None, f"no alpha: {str(error).rstrip('.')}")
    return LayerTail(layer.name, math.fsum(fit.alpha for fit in fits) / len(fits), note, tuple(found), fits)


def layer_spectra(
    weight: Tensor, layer: Layer, windows: Windows | None, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], str]:
    """The spectra to be fitted, each ascending, and a note: empty, or that no window fits and the whole matrix was taken.

    Of a layer of several matrices (experts) they are pooled. A convolution is a slice per kernel position, as the methods see it.
    """
    matrices = as_matrices(weight, layer)
    if layer.kind == "conv":
        slices = matrices.reshape(layer.matrices, layer.rows, layer.shape[1], -1).permute(0, 3, 1, 2).flatten(0, 1)
        side = min(slices.shape[1:])
        fits = windows is not None and side * min(windows.aspect, 1 / windows.aspect) >= 1
        note = "" if fits or windows is None else _whole(windows)
        return slice_spectra(slices, windows.aspect if windows is not None and fits else None, dtype), note
    if windows is not None and windows.shape(layer.rows, layer.columns) is not None:
        parts = [window_spectrum(matrix, windows, dtype) for matrix in matrices]
    else:
        parts = [spectrum(matrix, dtype) for matrix in matrices]
    note = _whole(windows) if windows is not None and windows.shape(layer.rows, layer.columns) is None else ""
    return [parts[0] if len(parts) == 1 else torch.cat(parts).sort().values], note


def _whole(windows: Windows) -> str:
    return f"too small for windows of aspect {windows.aspect:g}: its whole matrix was used"


def _facts(layer: Layer, look: Look) -> dict[str, object]:
    """What an exponent depends on beside the weight."""
    view = (layer.kind, layer.matrices, layer.rows, layer.columns, layer.transposed)
    return {"form": _FORM, "view": list(view), "look": asdict(look)}
