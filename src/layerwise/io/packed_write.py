"""Turn a stock folder just written into one of packed weights: codes in the place of the weights that they stand for.

What the library wrote stays word for word: names, shards it chose, ties. Each file is copied tensor by tensor, so that memory holds the
packed tensors of one file at most.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import MissingExtra, ModelError
from ..settings import nearest
from ..solvers.codes import Codes, rows_of
from .experts import DROPPED, Parts, experts_of, ignored_beside_linears, pattern_of, published, rebuilt, why_dense
from .pack_quantized import Scheme, scheme_of, tensors_of, weight_of, why_not, widened
from .packed_config import config_of
from .targets import Target, some_layers
from .weights import check_file, weight_files


@dataclass(frozen=True)
class Packing:
    """What will be packed, and why the rest of the codes will not. linears: every linear of the model."""

    codes: Mapping[str, Codes]
    linears: tuple[str, ...]
    notes: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]  # of the layers' weights
    ignored: tuple[str, ...] = ()  # patterns of what is a linear in engines alone
    parts: Mapping[str, Parts] = field(default_factory=dict)  # of experts, which are stored one by one

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Layer -> how it is stored."""
        return {name: scheme_of(codes) for name, codes in self.codes.items()}

    @property
    def targets(self) -> dict[str, Scheme]:
        """The layer's name in config.json, or the pattern of its experts -> how it is stored."""
        return {pattern_of(self.parts[n]) if n in self.parts else n: scheme for n, scheme in self.schemes.items()}

    @property
    def experts_by_block(self) -> bool:
        """Whether experts are packed that transformers cannot read: with unlike schemes, or beside zeros."""
        unlike = len({self.schemes[name] for name in self.parts}) > 1
        return bool(self.parts) and (unlike or any(not scheme.symmetric for scheme in self.schemes.values()))

    def stored(self, layer: str) -> dict[str, Codes]:
        """Layer in the files -> codes: itself, or its experts one by one. By their scales as stored transformers computes these."""
        own = self.codes[layer]
        if layer not in self.parts:
            return {layer: own}
        own = replace(own, scale_dtype=self.dtypes[layer])
        return {part: rows_of(own, rows) for part, rows in self.parts[layer].items()}

    def widened(self, codes: Mapping[str, Codes]) -> dict[str, int]:
        """Layer -> bits as stored, where these are not those of the codes that were handed over."""
        return {layer: final.bits for layer, final in self.codes.items() if final.bits != codes[layer].bits}

    def weight(self, layer: str) -> Tensor:
        """What a reader makes of the stored codes."""
        return weight_of(self.codes[layer], self.dtypes[layer]).cpu()


def choose(model: nn.Module, codes: Mapping[str, Codes], target: Target) -> Packing:
    """Decide for each layer that has codes: packed, or dense with a note that says why. Experts are packed all or none.

    Zeros are stored for vLLM alone: transformers with compressed-tensors 0.18 to 0.20 fails on them, so for it they are widened away.
    Raises ModelError for a layer that the model does not have or codes of another shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    never = _never(model, target)
    experts = {layer: codes[layer] for layer in experts_of(model) if layer in codes}
    no_experts = never or (_no_experts(model, experts, target) if experts else None)
    kept: dict[str, Codes] = {}
    dtypes: dict[str, torch.dtype] = {}
    dense: dict[str, list[str]] = {}  # why -> layers
    for layer, own in codes.items():
        module = modules.get(layer)
        weight = _weight(model, layer, module, own)
        reason = no_experts if layer in experts else never or _unpackable(module, weight, names, own)
        final: Codes | None = own
        if reason is None and not own.symmetric and target == "transformers":
            final = widened(own)
            reason = None if final else "transformers reads no zeros, and without them it takes more than 8 bits"
        if reason is not None or final is None:
            dense.setdefault(str(reason), []).append(layer)
            continue
        kept[layer], dtypes[layer] = final, weight.dtype
    notes = [f"{some_layers(layers)} saved dense: {reason}." for reason, layers in dense.items()]
    if wider := [layer for layer, final in kept.items() if final.bits != codes[layer].bits]:
        notes.append(
            f"{some_layers(wider)} stored symmetric with more bits, the weights unchanged: transformers with compressed-tensors 0.18 to"
            " 0.20 cannot read zeros. Solve with symmetric grids, or save for vllm, to store what was solved."
        )
    parts = {layer: stored for layer, stored in published(model).items() if layer in kept}
    ignored = ignored_beside_linears(model, packed=bool(parts))
    return Packing(kept, linears_of(model), tuple(notes), dtypes, ignored, parts)


def _never(model: nn.Module, target: Target) -> str | None:
    """Why nothing of this model can be packed."""
    if not (hasattr(model, "config") and hasattr(model, "save_pretrained")):
        return "the format is for models of transformers"
    return DROPPED if target == "transformers" and rebuilt(model) else None


def _no_experts(model: nn.Module, codes: Mapping[str, Codes], target: Target) -> str | None:
    """Why the experts of these codes are not packed, all of them."""
    if why := why_dense(model, {name: scheme_of(own) for name, own in codes.items()}, target):
        return why.removesuffix(".")
    reasons = (why_not(own, model.get_parameter(name).dtype) for name, own in codes.items())
    return next(filter(None, reasons), None)


def linears_of(model: nn.Module) -> tuple[str, ...]:
    """The names of its linears, which are what the format can hold."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def need_compressed_tensors() -> None:
    """Raise MissingExtra if transformers could not load a packed folder here, for want of compressed-tensors."""
    try:
        import compressed_tensors  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "compressed_tensors":  # installed but broken
            raise
        raise MissingExtra(
            "a packed folder is loaded back before it appears, which needs compressed-tensors: pip install 'layerwise[quant]'."
        ) from error


def pack_folder(folder: Path, packing: Packing) -> Packing:
    """Rewrite the weight files of a dense folder, and enter the schemes in its config.json. Returns what was packed.

    A layer whose weight the files name otherwise than the model stays dense, with a note. Raises ModelError if the files hold another
    weight than the codes give.
    """
    files = weight_files(folder)
    packing = _named(packing, {tensor.name for file in files for tensor in check_file(file)})
    if not packing.codes:
        return packing
    left = {part: codes for layer in packing.codes for part, codes in packing.stored(layer).items()}
    new_place: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = _packed_file(file, left)
        partial = file.with_name(f".{file.name}.packed")
        save_file(tensors, partial, metadata={"format": "pt"})
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        new_place |= dict.fromkeys(tensors, file.name)
        del tensors  # it maps the file that is replaced
        partial.replace(file)
    for index in folder.glob("*.safetensors.index.json"):
        index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": new_place}, indent=1))
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = config_of(packing.targets, packing.linears, packing.ignored)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return packing


def _named(packing: Packing, stored: set[str]) -> Packing:
    """Without the layers whose weights have other names in the files than in the model: engines match names in one of them alone."""
    absent = [n for n in packing.codes if any(f"{part}.weight" not in stored for part in packing.parts.get(n, (n,)))]
    if not absent:
        return packing
    note = (
        f"{some_layers(absent)} saved dense: the files of this architecture name weights otherwise than the model does."
    )
    kept = {name: codes for name, codes in packing.codes.items() if name not in absent}
    return replace(packing, codes=kept, notes=(*packing.notes, note))


def _packed_file(file: Path, left: dict[str, Codes]) -> dict[str, Tensor]:
    """The tensors of one file with codes for weights; takes the layers it has from `left`."""
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            layer = name.removesuffix(".weight")
            tensor = opened.get_tensor(name)
            if name == layer or layer not in left:
                tensors[name] = tensor
                continue
            if not torch.equal(weight_of(left[layer], tensor.dtype).cpu(), tensor):
                raise ModelError(
                    f'layer "{layer}": its weight is not what its codes give, so it was changed after they were computed.'
                    " Save without codes, or quantise it again."
                )
            tensors |= {f"{layer}.{part}": stored for part, stored in tensors_of(left.pop(layer)).items()}
    return tensors


def _weight(model: nn.Module, layer: str, module: nn.Module | None, codes: Codes) -> Tensor:
    """The weight that these codes are of; raises ModelError if there is none of that size."""
    weight = getattr(module, "weight", None) if module is not None else None
    if weight is None:  # experts: the layer is the parameter itself
        weight = dict(model.named_parameters(remove_duplicate=False)).get(layer)
    if not isinstance(weight, Tensor):
        known = [name for name, _ in model.named_modules()]
        raise ModelError(f'codes are for "{layer}", which the model does not have.{nearest(layer, known, cutoff=0.6)}')
    if weight.numel() != codes.values.numel():
        raise ModelError(f'codes of "{layer}" are {list(codes.values.shape)}, its weight is {list(weight.shape)}.')
    return weight


def _unpackable(
    module: nn.Module | None, weight: Tensor, names: Mapping[int, Sequence[str]], codes: Codes
) -> str | None:
    if type(module) is not nn.Linear:  # a subclass may use its weight in a way of its own
        return "the format is for linears"
    shared = names.get(id(weight), [])
    return f"its weight is shared ({', '.join(shared)})" if len(shared) > 1 else why_not(codes, weight.dtype)
