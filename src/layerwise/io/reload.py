"""Load a folder by a stock class and tell what came out: every tensor's digest, and the outputs on given inputs.

`verify` runs this file in a fresh process, as a user of the stock library would load the folder: it imports nothing of layerwise, but
for folders that layerwise alone can load.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def digests(model: nn.Module) -> dict[str, str]:
    """Name in the state dict -> sha256 of dtype, shape and bytes."""
    return {name: digest_of(tensor) for name, tensor in model.state_dict().items()}


def digest_of(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every floating-point tensor that the forward returns by name ("output" if it returns a bare one), on the CPU."""
    device = next(model.parameters()).device
    result = model(**{name: value.to(device) for name, value in inputs.items()})
    named = dict(result.items()) if isinstance(result, Mapping) else {"output": result}
    kept = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in kept.items()}


def loaded(request: Mapping[str, Any]) -> Any:
    """The model of the folder, by the class or function that the request names."""
    if request["library"] == "layerwise":
        return importlib.import_module("layerwise.io").load(request["folder"], remote_code=request["remote_code"])
    options: dict[str, Any] = {"use_safetensors": True}
    if request["library"] == "diffusers":
        library = importlib.import_module("diffusers")

        options |= {"torch_dtype": getattr(torch, request["dtype"]), "low_cpu_mem_usage": False}
    else:
        library = importlib.import_module("transformers")

        options |= {"dtype": "auto", "trust_remote_code": request["remote_code"]}
    return getattr(library, request["class_name"]).from_pretrained(request["folder"], **options)


def reload(request: Mapping[str, Any]) -> None:
    """Do what `request` says (see `verify.py`) and write answer.json and outputs.safetensors into its folder `answers`."""
    from safetensors.torch import load_file, save_file

    model = loaded(request).eval().to(request["device"])
    answers = Path(request["answers"])
    if (answers / "inputs.safetensors").exists():
        save_file(outputs(model, load_file(answers / "inputs.safetensors")), answers / "outputs.safetensors")
    if any(name.endswith(".weight_packed") for name in model.state_dict()):  # no forward has unpacked it
        model.hf_quantizer.compressor.decompress_model(model)
    answer = {
        "digests": digests(model),
        "class": type(model).__name__,
        "imported_layerwise": "layerwise" in sys.modules,
    }
    (answers / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    reload(json.loads(Path(sys.argv[1]).read_text()))
