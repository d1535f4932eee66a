"""A convolutional network at other widths, initialised anew: for plans that are made before training (PreCrop, PreConfig).

No weight is cropped: random weights have nothing to keep, and a layer's start depends on how many inputs it has. Every convolution,
linear and norm of the trace starts again by its own rule (`reset_parameters`), each from a stream of its own; parameters of the model's own
classes stay.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import ModelError, PlanError
from ..plan import Plan
from ..randomness import generator_for
from ..structure import ChannelLayer, Channels, cnn_channels
from ..tasks.undisturbed import random_states
from .apply import Applied


def image_of(plan: Plan) -> tuple[int, ...]:
    """(channels, height, width) of the images that a plan of channels was made for. Raises PlanError where it does not say."""
    text = str(plan.method.get("image_size", ""))
    try:
        return tuple(int(one) for one in text.split("x"))
    except ValueError:
        raise PlanError(
            'plan: method.image_size says for which images channels were counted, such as "3x32x32"; this one has'
            f' "{text}". Add it.'
        ) from None


def crop(model: nn.Module, plan: Plan, seed: int = 0) -> Applied:
    """Give every group of channels the width of the plan, in place, and start all layers anew from `seed`. Widths may be larger than they
    are. Layers are the same modules, dense, with new parameters: make optimisers afterwards. Torch's own random streams stay where they
    are.

    A constructor's own initialisation, beyond what each layer does for itself, is for the caller to repeat.
    Raises PlanError for groups that the model has not, or other treatments; ModelError for a model that cannot be traced or that does not
    run at these widths. Nothing has changed then.
    """
    channels = cnn_channels(model, image_of(plan))
    widths = widths_in(plan, channels)
    trial = copy.deepcopy(model).to("meta", torch.float32).eval()
    image = torch.empty(2, *channels.image, device="meta")
    shape = _shapes(trial(image))
    _resize(trial, channels, widths)
    try:
        found = _shapes(trial(image))
    except Exception as error:  # the model's own code: any class may come out
        raise ModelError(f"{type(model).__name__} does not run at the widths of the plan: {error}") from error
    if found != shape:
        raise ModelError(f"{type(model).__name__} gives {found} at the widths of the plan, not {shape}.")
    before = sum(one.numel() for one in model.parameters())
    _resize(model, channels, widths)
    start_anew(model, channels, seed)
    return Applied(before, sum(one.numel() for one in model.parameters()), (), ())


def widths_in(plan: Plan, channels: Channels) -> dict[str, int]:
    """Group -> width that the plan gives; groups that it does not name keep theirs. Raises PlanError with everything that does not fit."""
    problems, widths, reasons = [], channels.widths, dict(channels.left)
    for name, entry in plan.layers.items():
        resize = entry.resize
        if name not in widths:
            problems.append(f'plan: "{name}": {reasons.get(name, "no layer that first writes channels of their own")}.')
        elif resize is None or resize.channels is None:
            problems.append(f'plan: "{name}": a plan of channels says resize: {{channels: …}} and nothing else.')
        elif resize.channels < 1:
            problems.append(f'plan: "{name}": {resize.channels} channels; at least 1 must stay.')
        else:
            widths[name] = resize.channels
    if problems:
        raise PlanError(problems)
    return widths


def start_anew(model: nn.Module, channels: Channels, seed: int) -> None:
    """Every layer's own start, each from a stream of its own."""
    for layer in channels.layers:
        module = model.get_submodule(layer.name)
        with random_states():  # torch's seed is that of every accelerator, too
            torch.manual_seed(generator_for(seed, f"crop:{layer.name}").initial_seed())
            module.reset_parameters()  # type: ignore[operator]


def _resize(model: nn.Module, channels: Channels, widths: Mapping[str, int]) -> None:
    for layer in channels.layers:
        module = model.get_submodule(layer.name)
        inputs, outputs = channels.sizes(layer, dict(widths))
        set_sizes(module, layer, inputs, outputs)
        shapes = {"weight": _shape(module, layer, inputs, outputs), "bias": (outputs,)}
        shapes |= {"running_mean": (outputs,), "running_var": (outputs,)}
        for tensors in (module._parameters, module._buffers):
            for own, old in tensors.items():
                if old is None or own not in shapes or tuple(old.shape) == shapes[own]:
                    continue
                new = torch.empty(shapes[own], dtype=old.dtype, device=old.device)
                tensors[own] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new  # type: ignore[assignment]


def _shape(module: nn.Module, layer: ChannelLayer, inputs: int, outputs: int) -> tuple[int, ...]:
    if layer.kind == "norm":
        return (outputs,)
    if layer.kind == "linear":
        return (outputs, inputs)
    each = 1 if layer.kind == "depthwise" else inputs // layer.groups
    first = (inputs, outputs) if layer.kind == "transposed" else (outputs, each)
    return (*first, *module.kernel_size)  # type: ignore[misc]


def set_sizes(module: nn.Module, layer: ChannelLayer, inputs: int, outputs: int) -> None:
    """What the module remembers of its sizes."""
    remembered: dict[str, int | tuple[int, ...]] = {"in_features": inputs, "out_features": outputs}
    if layer.kind in ("conv", "depthwise", "transposed"):
        remembered = {"in_channels": inputs, "out_channels": outputs}
        if layer.kind == "depthwise":
            remembered["groups"] = inputs
    elif layer.kind == "norm":
        remembered = {"num_features": outputs, "num_channels": outputs, "num_parameters": outputs}
        remembered["normalized_shape"] = (outputs,)
    for name, size in remembered.items():
        if name in module.__dict__:
            setattr(module, name, size)


def _shapes(output: object) -> list[tuple[int, ...]]:
    leaves = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else [output]
    )
    return [tuple(one.shape) for one in leaves if isinstance(one, torch.Tensor)]
