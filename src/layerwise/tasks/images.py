"""Images for vision models: a folder, an `.npz` with `images` and `labels`, or scikit-learn's digits.

Pixels become float32 in [0, 1], (batch, channels, height, width), then minus `mean` over `std` where given. A transformers image
processor, where given, resizes and normalises instead.
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, MissingExtra
from ..randomness import generator_for
from .batches import Batches
from .sources import Facts

SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm".split())

Pixels = np.ndarray[Any, np.dtype[Any]]  # (height, width) or (height, width, channels), uint8
Processor = Callable[..., Mapping[str, Tensor]]


def images(
    source: str | Path,
    *,
    processor: Processor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch: int = 32,
    split: Literal["calibration", "held-out"] = "calibration",
) -> Batches:
    """Batches of {"pixel_values": (batch, channels, height, width) float32, "labels": (batch,) int64}.

    source: a folder of images (subfolders are classes, in order of name; a flat folder has no labels), an `.npz` of `images`
    (n, h, w) or (n, h, w, channels) uint8 with optional `labels`, or "digits" (1797 8x8 images; every fifth is held out, and
    `split` says which side to take; other sources have one split: whatever they hold).
    samples: so many, drawn without replacement by a private generator; None takes all in order.
    Raises DataError (one line) for data that cannot be used.
    """
    if batch < 1 or (samples is not None and samples < 1):
        raise ConfigError(f"samples={samples}, batch={batch}: give at least 1.")
    if (mean is None) != (std is None):
        raise ConfigError("mean and std go together: give both or neither.")
    if std is not None and not all(0 < one < math.inf for one in std):
        raise ConfigError(f"std={list(std)}: pixels are divided by it; give numbers above 0.")
    pictures, labels, facts = _read(source, split)
    if samples is not None:
        if samples > len(pictures):
            raise DataError(
                f"{source}: {len(pictures)} images cannot give {samples} samples. Use at most {len(pictures)}."
            )
        chosen = torch.randperm(len(pictures), generator=generator_for(seed, "images"))[:samples].tolist()
        pictures = [pictures[index] for index in chosen]
        labels = None if labels is None else [labels[index] for index in chosen]
        facts["seed"] = seed
    groups = []
    for start in range(0, len(pictures), batch):
        values = {"pixel_values": _pixels(pictures[start : start + batch], processor, mean, std, str(source))}
        if labels is not None:
            values["labels"] = torch.tensor(labels[start : start + batch], dtype=torch.int64)
        groups.append(values)
    shape = "x".join(str(size) for size in groups[0]["pixel_values"].shape[1:])
    normalised = (
        type(processor).__name__
        if processor
        else "none"
        if mean is None
        else f"mean {list(mean)} std {list(std or ())}"
    )
    facts |= {"samples": len(pictures), "shape": shape, "normalised": normalised, "batch": batch}
    return Batches(tuple(groups), facts)


def _read(source: str | Path, split: str) -> tuple[list[Pixels | Path], list[int] | None, Facts]:
    """Pixels (or paths, opened one batch at a time), labels if there are any, and facts for the protocol."""
    if str(source) == "digits":
        return _digits(split)
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise DataError(f"{source}: no such data. Give a folder of images, an .npz, or digits.")
    if path.suffix.lower() != ".npz":
        raise DataError(f"{source}: image data is a folder of images, an .npz, or digits.")
    return _npz(path)


def _digits(split: str) -> tuple[list[Pixels | Path], list[int], Facts]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sklearn":  # installed but broken: do not tell the user to install it
            raise
        raise MissingExtra("digits need scikit-learn: pip install 'layerwise[vision]'.") from error
    data = load_digits()
    held_out = np.arange(len(data.target)) % 5 == 0
    take = held_out if split == "held-out" else ~held_out
    pixels = np.round(data.images[take] * 255 / 16).astype(np.uint8)  # stored as 0..16
    return list(pixels), data.target[take].tolist(), {"source": "digits", "split": split}


def _npz(path: Path) -> tuple[list[Pixels | Path], list[int] | None, Facts]:
    try:
        with np.load(path, allow_pickle=False) as data:
            pixels = data["images"]
            labels = data.get("labels")
    except KeyError as error:
        raise DataError(
            f"{path}: no array `images` in this file. Save it with np.savez(path, images=..., labels=...)."
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz without pickle: {str(error).splitlines()[0]}") from error
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or not len(pixels):
        raise DataError(
            f"{path}: `images` is {pixels.dtype} {pixels.shape}; give uint8 (n, h, w) or (n, h, w, channels), n > 0."
        )
    if labels is not None and (labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu"):
        raise DataError(
            f"{path}: `labels` is {labels.dtype} {labels.shape}; give one integer for each of {len(pixels)} images."
        )
    return list(pixels), None if labels is None else labels.tolist(), {"source": str(path)}


def _folder(path: Path) -> tuple[list[Pixels | Path], list[int] | None, Facts]:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    pictures: list[Pixels | Path] = []
    labels: list[int] = []
    for label, folder in enumerate(classes or ["."]):
        found = sorted(file for file in (path / folder).iterdir() if file.suffix.lower() in SUFFIXES)
        pictures += found
        labels += [label] * len(found)
    if not pictures:
        raise DataError(f"{path}: no images in this folder (looked for {' '.join(sorted(SUFFIXES))}).")
    names = hashlib.sha256("\n".join(str(one) for one in classes).encode()).hexdigest()[:16]
    return pictures, labels if classes else None, {"source": str(path), "classes": len(classes), "class_names": names}


def _pixels(
    pictures: Sequence[Pixels | Path],
    processor: Processor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    source: str,
) -> Tensor:
    arrays = [_open(picture) if isinstance(picture, Path) else picture for picture in pictures]
    if processor is not None:
        colour = [array if array.ndim == 3 else np.stack([array] * 3, axis=-1) for array in arrays]
        try:
            made = processor(images=colour, return_tensors="pt", input_data_format="channels_last")
        except ValueError as error:
            raise DataError(
                f"{source}: the model's image processor does not take these images: {str(error).splitlines()[0]}"
            ) from error
        return made["pixel_values"].float()
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise DataError(
            f"{source}: images of different sizes {sorted(shapes)[:3]}. Give an image processor that resizes them."
        )
    values = torch.from_numpy(np.stack(arrays)).float() / 255
    values = values[:, None] if values.ndim == 3 else values.permute(0, 3, 1, 2).contiguous()
    if mean is None or std is None:
        return values
    if len(mean) != values.shape[1] or len(std) != values.shape[1]:
        raise ConfigError(
            f"mean and std have {len(mean)} and {len(std)} numbers; these images have {values.shape[1]} channels."
        )
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _open(path: Path) -> Pixels:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "PIL":
            raise
        raise MissingExtra(f"{path}: image files need pillow: pip install 'layerwise[vision]'.") from error
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: cannot be read as an image. Remove the file or replace it.") from error
