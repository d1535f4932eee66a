"""Load a model or tokenizer: the demo model, a local folder, or a hub name. Only safetensors; remote code only when asked for.

Everything that can be wrong with a folder is looked at before its weights are read, and said in one line.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..shrink import is_narrow, narrow
from ..tasks.undisturbed import quiet
from .armor_linear import factored as put_in_factors
from .experts import in_the_model
from .factored_read import FactoredFolder, factored_folder
from .packed_read import PackedFolder, dtype_in, packed_folder
from .places import Loader, architecture_of, loader_of, model_folder, read_config
from .weights import StoredTensor, check_file, read_tensors, weight_files

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    remote_code: bool = False,
    dense: bool = False,
) -> nn.Module:
    """The model, in evaluation mode. `name`: "demo", a folder, or a hub name; `dtype` "auto" keeps the stored one.

    The stock class is chosen from config.json (`places.loader_of`). Packed weights (compressed-tensors pack-quantized) become dense ones,
    bit for bit those that transformers unpacks; compressed-tensors is not needed. Layers in factors run in them (`ArmorLinear`), or
    with `dense` become plain linears of the product. Raises ModelError, one line: no such place, config or
    weights, a truncated or corrupt file, an unknown architecture, weights that the architecture lacks or does not know.
    """
    folder = model_folder(name, remote_code=remote_code)
    loader = loader_of(folder, remote_code=remote_code)
    stored = [tensor for file in weight_files(folder) for tensor in check_file(file)]
    wanted = _dtype(dtype, loader, stored)
    if (in_factors := factored_folder(folder)) is not None:
        model = _build_unpacked(replace(in_factors, products=dense), loader, wanted)
        if not dense:
            _run_in_factors(model, in_factors, wanted)
        return _to(model, device).eval()
    packed = packed_folder(folder)
    if packed is None:
        return _to(_build(folder, loader, wanted), device).eval()
    model = _build_unpacked(packed, loader, wanted)
    model.layerwise_quantized = in_the_model(model, packed.schemes)  # type: ignore[assignment]  # see recover.quantized
    return _to(model, device).eval()


def load_tokenizer(name: str | Path, *, remote_code: bool = False) -> Any:
    """The tokenizer beside the model (a transformers tokenizer). Raises ModelError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    folder = model_folder(name, remote_code=remote_code)
    if not any(
        (folder / file).is_file()
        for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        raise ModelError(f"{folder}: no tokenizer in it. Put tokenizer.json and tokenizer_config.json there.")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # whatever the tokenizer's own code raises on bad files
        raise ModelError(f"{folder}: its tokenizer cannot be read: {_line(error)}") from error


def load_image_processor(name: str | Path, *, remote_code: bool = False) -> Any:
    """What prepares images for the model (a transformers image processor); None where its folder has none. Raises ModelError."""
    from transformers import AutoImageProcessor

    folder = model_folder(name, remote_code=remote_code)
    if not (folder / "preprocessor_config.json").is_file():
        return None
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # whatever the processor's own code raises on bad files or missing packages
        raise ModelError(f"{folder}: its image processor cannot be made: {_line(error)}") from error


def load_into(model: nn.Module, folder: str | Path) -> nn.Module:
    """Fill a model of your own class with the weights of a folder that `save` wrote. Returns it.

    Linears that the folder has in factors become `ArmorLinear`. Raises ModelError if names or shapes differ; the model is then
    unchanged, but for these.
    """
    folder = Path(folder)
    if (in_factors := factored_folder(folder)) is not None:
        _run_in_factors(model, in_factors, "auto")
    files = weight_files(folder)
    stored = {tensor.name: tensor.shape for file in files for tensor in check_file(file)}
    own = model.state_dict(keep_vars=True)
    for name, shape in stored.items():
        if name not in own or tuple(own[name].shape) != shape:
            there = f"of shape {list(own[name].shape)}" if name in own else "absent"
            raise ModelError(
                f'{folder}: "{name}" of shape {list(shape)} is {there} in the model. Build the model as it was saved.'
            )
    filled = {id(own[name]) for name in stored}  # the names of a tied tensor share one entry in the file
    if missing := [name for name, tensor in own.items() if id(tensor) not in filled]:
        raise ModelError(f"{folder}: {len(missing)} weights of the model are not in the files ({_some(missing)}).")
    with torch.no_grad():
        for file in files:
            for name, tensor in read_tensors(file):
                own[name].copy_(tensor)
    return model


def check_finite(model: nn.Module) -> None:
    """Raise ModelError naming the first parameter that has a NaN or an infinity, and how many."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (finite := parameter.detach().isfinite()).all():
            bad = parameter.numel() - int(finite.sum())
            raise ModelError(
                f'model: parameter "{name}" has {bad} of {parameter.numel()} values that are NaN or infinite. '
                "Take a sound checkpoint; if it was cast to float16, load it in bfloat16 or float32."
            )


def _build(folder: Path, loader: Loader, dtype: str | torch.dtype) -> nn.Module:
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if loader.library == "diffusers":
        options |= {"torch_dtype": dtype, "low_cpu_mem_usage": False}  # True needs accelerate
    else:
        options |= {"dtype": dtype, "trust_remote_code": loader.remote_code}
    try:
        with quiet():
            model, info = _class_of(folder, loader).from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the library's own code, on files of others: any class may come out
        raise ModelError(f"{folder}: {loader.library} cannot build the model: {_line(error)}") from error
    _check_keys(folder, info)
    assert isinstance(model, nn.Module)  # noqa: S101  (for the type checker)
    return model


def _class_of(folder: Path, loader: Loader) -> Any:
    """The stock class; where config.json names widths of layers, the class that builds them."""
    if loader.library != "transformers" or loader.remote_code or not is_narrow(read_config(folder)):
        return loader.get()
    import transformers

    return narrow(getattr(transformers, architecture_of(read_config(folder))))


def _run_in_factors(model: nn.Module, folder: FactoredFolder, dtype: str | torch.dtype) -> None:
    """Linears in factors in the place of plain ones. dtype: of the factors, too, unless "auto"."""
    folder.check_turned(model)
    for layer in folder.patterns:  # one by one: what they replace goes at once
        put_in_factors(model, {layer: folder.factors(layer)})
        if isinstance(dtype, torch.dtype):
            model.get_submodule(layer).to(dtype)


def _build_unpacked(packed: PackedFolder | FactoredFolder, loader: Loader, dtype: str | torch.dtype) -> nn.Module:
    """The stock class, filled with the dense weights of packed ones or factors; its config says nothing of packing any more."""
    import transformers

    folder = packed.folder
    architecture = getattr(transformers, architecture_of(read_config(folder)), None)
    if loader.remote_code or architecture is None:
        raise ModelError(
            f"{folder}: packed weights and factors are read into stock classes of transformers, not into code of its own."
        )
    architecture = narrow(architecture) if is_narrow(read_config(folder)) else architecture
    wanted = dtype if isinstance(dtype, torch.dtype) else dtype_in(read_config(folder))
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            state = dict(packed.tensors(wanted))
            model, info = architecture.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=wanted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            if (folder / "generation_config.json").is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except ModelError:
        raise
    except Exception as error:  # the library's own code, on files of others: any class may come out
        raise ModelError(f"{folder}: transformers cannot build the model: {_line(error)}") from error
    _check_keys(folder, info)
    assert isinstance(model, nn.Module)  # noqa: S101  (for the type checker)
    if isinstance(packed, FactoredFolder):
        packed.check_turned(model)
    return model


def _check_keys(folder: Path, info: dict[str, Any]) -> None:
    """The library would fill what is missing with random numbers and drop what it does not know; both are errors here."""
    mismatched = sorted(info.get("mismatched_keys") or [])
    if mismatched:
        name, stored, built = mismatched[0]
        raise ModelError(
            f'{folder}: {len(mismatched)} weights have another shape than config.json says: "{name}" is {list(stored)},'
            f" config.json makes it {list(built)}. Take the config.json that belongs to these weights."
        )
    if missing := sorted(info.get("missing_keys") or []):
        raise ModelError(
            f"{folder}: {len(missing)} weights that config.json asks for are not in the files ({_some(missing)})."
            " Take the config.json that belongs to these weights."
        )
    unexpected = sorted(info.get("unexpected_keys") or [])
    if inside := [name for name in unexpected if any(part.isdigit() for part in name.split("."))]:
        raise ModelError(  # blocks of the file that the model would lack: it would be another model
            f"{folder}: {len(inside)} weights of blocks in the files have no place in the model that config.json describes"
            f" ({_some(inside)}). Take the config.json that belongs to them, or remove them from the files."
        )
    if unexpected:  # a head that this class does not use, as many published checkpoints have
        warnings.warn(f"{folder}: not used by this model: {_some(unexpected)}.", stacklevel=3)


def _dtype(dtype: str | torch.dtype, loader: Loader, stored: list[StoredTensor]) -> str | torch.dtype:
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ModelError(f'dtype "{dtype}": give auto, float32, bfloat16 or float16.')
        return found
    if dtype == "auto" and loader.library == "diffusers":  # it knows no "auto": the first floating tensor decides
        return next((_STORED[tensor.type] for tensor in stored if tensor.type in _STORED), torch.float32)
    return dtype


def _to(model: nn.Module, device: str | torch.device) -> nn.Module:
    try:
        return model.to(device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch raises each of them for an absent device
        raise ModelError(f'device "{device}": {_line(error)} Give cpu, cuda or mps.') from error


def _line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
