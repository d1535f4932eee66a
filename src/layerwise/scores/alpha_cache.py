"""Exponents that were computed before, kept in a folder: a spectrum takes seconds to hours, and depends on the weights alone.

One small JSON file per layer, named by a hash of the weight's bytes and of all that its exponent depends on, the kind of device and the
version of torch with it. A weight that changed has another name, so nothing has to be thrown away to be right; and a run that was killed
goes on after its last layer.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import whole_file

_folder: ContextVar[Path | None] = ContextVar("layerwise_alphas", default=None)


@contextmanager
def alphas_kept(folder: str | Path | None) -> Iterator[None]:
    """Within, `alpha_hill` looks into this folder first and keeps there what it computed. None: it does neither, as outside."""
    token = _folder.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def alphas_folder() -> Path | None:
    """Where alphas are kept at the moment."""
    return _folder.get()


def fingerprint_of(weight: Tensor, facts: Mapping[str, Any]) -> str:
    """64 hexadecimal digits of the weight's bytes, dtype and shape, of what computes, and of everything else that counts (plain values)."""
    told = {**facts, "dtype": str(weight.dtype), "shape": list(weight.shape)}
    told |= {"device": weight.device.type, "torch": str(torch.__version__)}  # other eigenvalues in the last digits
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recall(folder: Path, key: str) -> dict[str, Any] | None:
    """What was kept under this key. None if nothing was, or it was damaged: then it is computed again."""
    try:
        found = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    alpha = found.get("alpha", math.nan) if isinstance(found, dict) else math.nan
    sound = alpha is None or (isinstance(alpha, float) and math.isfinite(alpha))
    return found if sound and isinstance(found.get("note"), str) else None


def keep(folder: Path, key: str, found: Mapping[str, Any]) -> str:
    """Write it, whole or not at all. Returns an empty string, or what went wrong: no reason to lose the result itself."""
    try:
        with whole_file(folder / f"{key}.json") as partial:
            partial.write_text(json.dumps(dict(found)), encoding="utf-8")
    except OSError as error:
        return f"alphas could not be kept in {folder}: {error.strerror or error}"
    return ""
