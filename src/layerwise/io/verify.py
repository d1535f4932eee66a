"""Check a saved folder the way its reader will use it: a fresh process, the stock loader, the same numbers.

Two comparisons: every tensor of the state dict bit for bit, and the outputs on small fixed inputs within the rounding of the dtype.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import SaveError
from . import reload
from .pack_quantized import PARTS
from .packed_read import packed_folder
from .packed_write import Packing
from .places import Loader
from .weights import read_tensors, weight_files

# Share of the largest output that a reloaded model may differ by: kernels may sum in another order in another process
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Verified:
    """What was compared between the model in memory and the one loaded from the folder.

    difference: largest absolute difference over `outputs`, or None where no fixed inputs suit the model (weights alone compared).
    """

    loader: str
    tensors: int
    outputs: tuple[str, ...]
    difference: float | None
    why: str = "no fixed inputs suit this model"  # that no outputs were compared

    def words(self) -> str:
        """One sentence for people."""
        text = f"Loads with {self.loader}: {self.tensors} tensors equal bit for bit"
        if self.difference is None:
            return f"{text}; outputs not compared, {self.why}."
        return f"{text}, largest difference of {' and '.join(self.outputs)} {self.difference:.2g} (fresh process)."


def verify(
    model: nn.Module,
    folder: Path,
    loader: Loader,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    packing: Packing | None = None,
    seconds: float = 900,
) -> Verified:
    """Compare `model` with what `loader` makes of `folder` in a fresh process, within `seconds`.

    inputs: keyword arguments of the forward; by default small fixed ones that the model accepts. packing: what the folder has as codes;
    the loader must unpack the very weights.
    Raises SaveError if the process dies or takes too long, a tensor differs, or the outputs differ by more than rounding.
    """
    inputs, expected = _reference(model, inputs)
    parameter = next(model.parameters())
    with tempfile.TemporaryDirectory(prefix="layerwise-verify-") as answers:
        request = {
            "library": loader.library,
            "class_name": loader.class_name,
            "remote_code": loader.remote_code,
            "folder": str(folder.resolve()),
            "device": str(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "answers": answers,
        }
        if inputs:
            save_file(
                {name: value.cpu().contiguous().clone() for name, value in inputs.items()},
                f"{answers}/inputs.safetensors",
            )
        _run(request, seconds)
        answer = json.loads(Path(answers, "answer.json").read_text())
        got = load_file(f"{answers}/outputs.safetensors") if inputs else {}
    own, loaded = reload.digests(model), dict(answer["digests"])
    if packing is not None:
        for layer in packing.codes:
            name = layer if layer in packing.parts else f"{layer}.weight"
            stored = packing.weight(layer).reshape(model.get_parameter(name).shape)
            own[name] = reload.digest_of(stored)  # the model may have -0.0, codes cannot
            for part in PARTS:  # what the library keeps beside the weight
                loaded.pop(f"{layer}.{part}", None)
    _compare_tensors(own, loaded, str(folder))
    difference = _compare_outputs(expected, got, str(folder)) if expected else None
    allowed = " (trust_remote_code=True)" if loader.remote_code else ""
    return Verified(f"{loader.library}.{loader.class_name}{allowed}", len(own), tuple(expected), difference)


def verify_packed(model: nn.Module, folder: Path, packing: Packing) -> Verified:
    """For a folder that transformers cannot load (zeros, in compressed-tensors 0.18 to 0.20): read it back with our own reader."""
    own, count = model.state_dict(), 0
    packed = packed_folder(folder)
    assert packed is not None  # noqa: S101  (it was written as one)
    for name, tensor in packed.tensors(next(iter(packing.dtypes.values()))):
        count += 1
        layer = name.removesuffix(".weight")
        wanted = packing.weight(layer) if layer in packing.codes else own[name].detach().cpu()
        if not _same_bits(wanted, tensor):
            raise SaveError(f'{folder}: "{name}" reads back different from the model. The disk may be failing.')
    why = "since transformers cannot load zeros with compressed-tensors 0.18 to 0.20"
    return Verified("layerwise.load", count, (), None, why)


def verify_tensors(model: nn.Module, folder: Path) -> Verified:
    """For a module of the user's own class, which no other process can build: compare the file with the model, bit for bit."""
    own, count = model.state_dict(), 0
    for file in weight_files(folder):
        for name, tensor in read_tensors(file):
            count += 1
            if name not in own or not _same_bits(own[name].detach().cpu(), tensor):
                raise SaveError(f'{folder}: "{name}" reads back different from the model. The disk may be failing.')
    return Verified("layerwise.io.load_into", count, (), None)


def _reference(
    model: nn.Module, inputs: Mapping[str, Tensor] | None
) -> tuple[Mapping[str, Tensor] | None, dict[str, Tensor]]:
    """(inputs, outputs of `model` on them); (None, {}) if the model accepts none of the fixed inputs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        if inputs is not None:
            return inputs, reload.outputs(model, inputs)
        for candidate in _candidates(model):
            try:
                expected = reload.outputs(model, candidate)
            except Exception:  # noqa: S112  (a forward may refuse arguments in any way; the next candidate is tried)
                continue
            if expected:
                return candidate, expected
        return None, {}
    finally:
        for module in training:  # each by itself: a part may have been frozen in evaluation mode
            module.training = True


def _candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Small fixed inputs by modality, the likeliest first: text, text to text, image, image and text, sound."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return
    vision = getattr(config, "vision_config", config)
    words = getattr(config.get_text_config(), "vocab_size", None)
    size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
    text, image = {}, {}
    if isinstance(words, int):
        special = getattr(config, "image_token_id", None)  # one without an image would be refused
        ids = [i for i in range(3, min(words, 40)) if i != special] or [0]
        text = {"input_ids": torch.tensor([ids[:16]])}
    if isinstance(size, int):
        pixels = torch.linspace(-1, 1, channels * size * size).reshape(1, channels, size, size)
        image = {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    decoder = {"decoder_input_ids": text["input_ids"][:, :8]} if text else {}
    if getattr(config, "is_encoder_decoder", False):
        yield text | decoder
        if mels := getattr(config, "num_mel_bins", None):
            frames = 2 * int(getattr(config, "max_source_positions", 1500))
            sound = torch.linspace(-1, 1, mels * frames).reshape(1, mels, frames)
            yield {"input_features": sound.to(next(model.parameters()).dtype)} | decoder
    else:
        yield from (candidate for candidate in (text, image) if candidate)
        yield text | image


def _run(request: Mapping[str, Any], seconds: float) -> None:
    """Run `reload.py` from standard input, in an empty folder, so that nothing beside it can be imported by accident."""
    answers = Path(request["answers"])
    (answers / "request.json").write_text(json.dumps(request))
    environment = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_MODULES_CACHE": str(
            answers / "modules"
        ),  # where transformers copies code of the folder to: gone with the answers
    }
    try:
        done = subprocess.run(
            [sys.executable, "-", str(answers / "request.json")],
            input=Path(reload.__file__).read_text(encoding="utf-8"),
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=answers,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SaveError(
            f"{request['folder']}: loading it back took more than {seconds:g} seconds and was stopped."
        ) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = (
            f"was killed by signal {-done.returncode}; it may need more memory" if done.returncode < 0 else "failed"
        )
        raise SaveError(
            f"{request['folder']}: {request['library']}.{request['class_name']} in a fresh process {reason}"
            f" ({lines[-1] if lines else 'it said nothing'})."
        )


def _compare_tensors(own: Mapping[str, str], loaded: Mapping[str, str], folder: str) -> None:
    if wrong := [name for name in {**own, **loaded} if own.get(name) != loaded.get(name)]:
        raise SaveError(
            f"{folder}: {len(wrong)} of {len(own)} tensors load back different from the model, first"
            f' "{wrong[0]}"{"" if wrong[0] in loaded else ", which is missing"}.'
        )


def _compare_outputs(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], folder: str) -> float:
    largest = 0.0
    for name, own in expected.items():
        other = got.get(name)
        if other is None or other.shape != own.shape:
            raise SaveError(f'{folder}: the model loaded back gives no "{name}" of shape {list(own.shape)}.')
        if own.isnan().any():
            raise SaveError(
                f'{folder}: the model\'s own "{name}" has NaN, so it was not saved. Look for NaN in its weights.'
            )
        finite = own.isfinite()  # some models mark impossible tokens with -inf
        difference = float((own - other)[finite].abs().max()) if finite.any() else 0.0
        limit = _TOLERANCE.get(own.dtype, 1e-2) * float(own[finite].abs().max()) if finite.any() else 0.0
        if not difference <= limit or not torch.equal(own[~finite], other[~finite]):
            raise SaveError(
                f'{folder}: "{name}" of the model loaded back differs by {difference:.3g}, more than {limit:.3g}.'
            )
        largest = max(largest, difference)
    return largest


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )
