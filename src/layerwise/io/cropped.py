"""Convolutional networks of other widths in and out of folders: weights in safetensors, the widths in layerwise.json, built by your own
code.

No class of ours stands in the way: the network is the one that your constructor makes, at its own widths, cropped to those of the folder
and filled.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import MissingExtra, ModelError, SaveError
from ..files import output_file
from ..plan import Plan, Resize
from ..shrink import crop, image_of
from ..structure import cnn_channels
from ..version import __version__
from .load import load_into
from .whole import check_output, whole_folder

RECORD, ENTRY, WEIGHTS = "layerwise.json", "channels", "model.safetensors"


def save_cropped(model: nn.Module, folder: str | Path, plan: Plan, *, force: bool = False) -> Path:
    """Write the weights of a network that has the widths of `plan` (`shrink.crop`, `shrink.shrink_channels`), and the plan. The folder
    appears whole or not at all, and every tensor has been read back.

    Raises OutputError (exists, not writable), PlanError for a plan without widths or image size, ModelError for a network that has other
    widths or cannot be traced, SaveError where what was written is not what is in memory.
    """
    image = image_of(plan)
    size = "x".join(map(str, image))
    widths = {name: one.resize.channels for name, one in plan.layers.items() if one.resize}
    has = cnn_channels(model, image).widths
    if odd := next((name for name, width in widths.items() if has.get(name) != width), None):
        raise ModelError(
            f'"{odd}" has {has.get(odd, "no")} channels that can change, {widths[odd]} in the plan: crop(model, plan) comes first.'
        )
    target = check_output(folder, force=force)
    tensors = _tensors(model)
    facts: dict[str, Any] = {"layerwise": __version__, ENTRY: {"image_size": size, "widths": widths}}
    with whole_folder(target, force=force) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / RECORD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        plan.save(partial / "plan.yaml")
        with safe_open(partial / WEIGHTS, framework="pt") as file:
            for name, tensor in tensors.items():
                if not torch.equal(file.get_tensor(name).nan_to_num(), tensor.nan_to_num()):
                    raise SaveError(f'{target}: "{name}" does not read back as it was written. Check the disk.')
    return target


def load_cropped(model: nn.Module, folder: str | Path) -> nn.Module:
    """The network of a folder that `save_cropped` wrote: `model`, as your constructor makes it at its full widths, cropped and filled, in
    place, in evaluation mode.

    Raises ModelError where the folder has no widths or its weights do not fit, PlanError where the model has other groups of channels.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))[ENTRY]
        layers = {str(name): Resize(channels=width) for name, width in record["widths"].items()}
        plan = Plan(method={"image_size": record["image_size"]}, layers=layers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder}: {RECORD} does not say the widths of channels ({type(error).__name__}). Give a folder that save_cropped wrote."
        ) from error
    try:
        crop(model, plan)
        return load_into(model, folder).eval()
    except SafetensorError as error:
        raise ModelError(f"{folder}: the weights cannot be read: {error}") from error


def export_onnx(model: nn.Module, path: str | Path, plan: Plan) -> Path:
    """Write the network as ONNX for batches of any size of the plan's images: widths are plain shapes there, and any runtime has them.

    Raises MissingExtra without the packages onnx and onnxscript, OutputError where the file cannot be written.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtra(f"export_onnx needs {package}: pip install onnx onnxscript.")
    image = torch.zeros(2, *image_of(plan), device=next(model.parameters()).device)
    batch = torch.export.Dim("batch")
    with output_file(Path(path)) as partial:
        mode = model.training
        try:
            torch.onnx.export(
                model.eval(), (image,), str(partial), dynamo=True, dynamic_shapes=({0: batch},), external_data=False
            )
        finally:
            model.train(mode)
    return Path(path)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those with several names once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().cpu().contiguous()
    return found
