"""Calibration and evaluation batches, and how one goes through a model."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]  # keyword arguments of the model's forward


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """A fixed list of batches with where they came from; the same in every epoch and on every rank.

    protocol: plain facts that belong beside every number made from this data (source, samples, length, tokens, seed, bos).
    """

    batches: tuple[Batch, ...]
    protocol: Mapping[str, str | int | float | bool]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def hash(self) -> str:
        """First 16 hex digits of sha256 over names, shapes and values of every tensor, in order."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                value = batch[name].detach().cpu().contiguous()
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else str(value.item()).encode())
        return digest.hexdigest()[:16]


def first_samples(data: Sequence[Batch], samples: int | None) -> list[Batch]:
    """The first batches that hold at least `samples` samples together, or all of them; a sample is a row of a batch."""
    chosen: list[Batch] = []
    for batch in data:
        if samples is not None and count_samples(chosen) >= samples:
            break
        chosen.append(batch)
    return chosen


def exactly(data: Sequence[Batch], samples: int) -> list[Batch]:
    """The first `samples` samples, or all there are: the last batch cut to size where its tensors have a row for each sample."""
    chosen = first_samples(data, samples)
    if (over := count_samples(chosen) - samples) > 0:
        last = chosen.pop()
        rows = count_samples([last])
        chosen.append({k: v[: rows - over] if v.ndim and len(v) == rows else v for k, v in last.items()})
    return chosen


def count_samples(data: Sequence[Batch]) -> int:
    """Rows of all batches together."""
    return sum(next((int(value.shape[0]) for value in batch.values() if value.ndim), 1) for batch in data)


def single_samples(data: Sequence[Batch], samples: int | None = None) -> list[Batch]:
    """The first `samples` samples (None: all) as batches of one; what has not one row for each sample goes whole with every one."""
    singles: list[Batch] = []
    for batch in data:
        rows = count_samples([batch])
        for row in range(rows if samples is None else min(rows, samples - len(singles))):
            singles.append({k: v[row : row + 1] if v.ndim and len(v) == rows else v for k, v in batch.items()})
    return singles


def call(model: nn.Module, batch: Batch) -> object:
    """One forward pass of the real model, KV cache off where the model knows the word. Tensors go to `model`'s device.

    A plain module whose `forward` does not know the names in the batch gets `labels` left out and the one tensor that remains
    as its first argument, so that image batches go through any network.
    """
    device = next((parameter.device for parameter in model.parameters() if parameter.device.type != "meta"), None)
    arguments = {name: value.to(device) for name, value in batch.items()}
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        return model(**arguments, use_cache=False)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        # LLaVA hands the word on to its language model: with a cache, a block that runs again sees its first run's keys
        return model(**arguments, **({"use_cache": False} if _has_cache(model) else {}))
    arguments = {name: value for name, value in arguments.items() if name in parameters or name != "labels"}
    if len(arguments) == 1 and arguments.keys().isdisjoint(parameters):
        return model(*arguments.values())
    return model(**arguments)


def has_encoder(model: nn.Module) -> bool:
    """Whether it has an encoder and a decoder, or its language model has."""
    config = getattr(model, "config", None)
    parts = (config, getattr(config, "text_config", None))
    return any(getattr(part, "is_encoder_decoder", False) is True for part in parts)


def _has_cache(model: nn.Module) -> bool:
    """Whether the config, or that of the language model inside, knows the word."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    return hasattr(text_config() if text_config else config, "use_cache")
