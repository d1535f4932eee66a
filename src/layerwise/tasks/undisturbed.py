"""Looking at models without leaving a trace."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ConfigError


@contextmanager
def undisturbed(models: Sequence[nn.Module], device: str | torch.device | None = None) -> Iterator[None]:
    """Evaluation mode, no gradients, models on `device`; afterwards every module's mode, the device and the random state are
    what they were. Raises ConfigError for moving a model that is spread over several devices."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    homes = [_home(model) for model in models] if device is not None else []
    state = torch.get_rng_state()
    try:
        for model in models:
            model.eval()
            if device is not None:
                model.to(device)
        with torch.no_grad():
            yield
    finally:
        for model, home in zip(models, homes, strict=False):
            model.to(home)
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(state)  # a forward in evaluation mode draws nothing; a model's own code may


def _home(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ConfigError(f"the model lies on {len(devices)} devices: leave `device` out, it is evaluated where it is.")
    return devices.pop()
