"""The facts that belong beside every number: which data, which model dtype, on what, with which versions."""

import hashlib
import json
import platform
from importlib.metadata import version

import torch
from torch import nn

from ..io.reload import digests
from ..tasks.batches import Batches
from .logits import dtype_of

Protocol = dict[str, str | int | float | bool]


def environment_of(model: nn.Module) -> Protocol:
    """Hash of the weights, device, dtype, attention kernel and versions: what moves a number in the last digits, or a time by a lot."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return {
        "model": model_hash(model),
        "dtype": dtype_of(model),
        "device": f"{device.type} ({name})",
        "attention": attention or "the model's own",
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def model_hash(model: nn.Module) -> str:
    """First 16 hex digits of sha256 over name, dtype, shape and bytes of every tensor of the state dict; the same on every device."""
    return hashlib.sha256(json.dumps(sorted(digests(model).items())).encode()).hexdigest()[:16]


def protocol_of(model: nn.Module, batches: Batches) -> Protocol:
    """The data's own protocol, its hash, and the environment."""
    return {**batches.protocol, "hash": batches.hash, **environment_of(model)}
