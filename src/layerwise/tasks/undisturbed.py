"""Looking at models without leaving a trace."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError

Streams = tuple[Tensor, list[Tensor]]
"""States of torch's generators: of the CPU, and of every CUDA device where CUDA is in use."""


def random_streams() -> Streams:
    """Where torch's random streams stand, for `go_back_to`."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if _cuda_in_use() else []


def go_back_to(streams: Streams) -> None:
    """Let torch's random streams go on from there."""
    cpu, cuda = streams
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def random_states() -> Iterator[None]:
    """For libraries that seed or draw from the global generators of Python, numpy and torch: afterwards all are what they were."""
    python, numpy, streams = random.getstate(), np.random.get_state(), random_streams()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        go_back_to(streams)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' bars and reports off for a moment: what they would say comes as our errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def left_alone(models: Sequence[nn.Module], *, by_batch: bool = False) -> Iterator[None]:
    """Evaluation mode; afterwards the mode of every module and torch's random streams are what they were.

    by_batch: batch norms normalise by the batch, as in training, and all else is in evaluation mode. A forward in evaluation mode draws
    nothing, but a model's own code may.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    streams = random_streams()
    try:
        for module, _ in modes:
            module.training = by_batch and isinstance(module, _BatchNorm)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        go_back_to(streams)


@contextmanager
def undisturbed(models: Sequence[nn.Module], device: str | torch.device | None = None) -> Iterator[None]:
    """`left_alone`, without gradients and with the models on `device`, from which they go back to where they were.

    Raises ConfigError for moving a model that is spread over several devices."""
    homes = [_home(model) for model in models] if device is not None else []
    try:
        if device is not None:
            for model in models:
                model.to(device)  # first: it may be the first use of CUDA, whose streams are there from then on
        with left_alone(models), torch.no_grad():
            yield
    finally:
        for model, home in zip(models, homes, strict=False):
            model.to(home)


def _home(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ConfigError(f"the model lies on {len(devices)} devices: leave `device` out, it is evaluated where it is.")
    return devices.pop()


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
