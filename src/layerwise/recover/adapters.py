"""Adapters that leave zeros zero, through PEFT: few numbers to train, a base that does not move, and a merge that fills nothing.

    add_adapter(model, "hira", rank=32)        # trains W * (1 + B A)
    ...                                        # any trainer: only the adapter takes gradients
    merge_adapter(model)                       # or save_adapter(model, folder), and load_adapter(model, folder) on the same base

- "hira": W * (1 + B A), an elementwise factor of any rank the mask leaves (PEFT's own; SPP is a special case of it).
- "shira": a fixed random set of kept entries, rank * (outputs + inputs) of them in each layer (PEFT's own).
- "masked-lora": W + s (B A) * mask (`masked_lora.py`), s = alpha / rank, alpha 2 * rank as in LoSA's and Wanda's recipes.

Merging is done in float32, and what was pruned is zero afterwards, bit for bit. The base is frozen, so a quantized one can be trained
beside, too; its adapter must stay apart.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError, MissingExtra, ModelError, OutputError
from ..randomness import generator_for
from ..structure import Structure, structure_of
from ..tasks.undisturbed import random_states
from .adapter_masks import entries_of, masks_for
from .quantized import quantized_by_loader

KINDS = ("hira", "shira", "masked-lora")
FILE, WEIGHTS, KEEP = "layerwise_adapter.json", "adapter_model.safetensors", "keep.safetensors"
NAME = "default"
_PREFIX = "base_model.model."  # of the names in PEFT's files
_BY_LOADER = (
    "the linears of this {} are those of a loader of quantized weights. Load its folder with layerwise.load, which makes plain linears of"
    " packed weights (compressed-tensors); on other formats PEFT puts its own adapters."
)


@dataclass(frozen=True)
class Adapter:
    """What `add_adapter` was asked for, and what it was put on; carried by the model as `layerwise_adapter`."""

    kind: str
    rank: int
    alpha: float | None
    dropout: float
    seed: int
    layers: tuple[str, ...]
    base: str  # digest of all weights
    trained: tuple[str, ...]  # parameters that took gradients before


def add_adapter(
    model: nn.Module,
    kind: str,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    keep: Mapping[str, Tensor] | None = None,
    structure: Structure | None = None,
    seed: int = 0,
) -> nn.Module:
    """Put an adapter on the linears in the blocks of the model, in place, and freeze everything else; the outputs are what they were.

    alpha: of masked-lora alone, None: 2 * rank. dropout: of what the adapter sees (not of shira). keep: masks by name of layer or
    parameter; None: what is not zero. seed: of the factors' start and of shira's entries; global random streams are left alone.
    Raises ConfigError (kind, settings, a mask of another shape, a rank that shira's kept entries do not hold), ModelError (no linears, an
    adapter already), MissingExtra without peft.
    """
    peft = _peft()
    _check(kind, rank, alpha, dropout)
    if getattr(model, "layerwise_adapter", None) is not None:
        raise ModelError("the model has an adapter already: merge it, or load the model anew.")
    names = _linears(model, structure)
    masks = masks_for(model, names, keep)
    trained = tuple(name for name, one in model.named_parameters() if one.requires_grad)
    alpha = (2.0 * rank if alpha is None else float(alpha)) if kind == "masked-lora" else None
    adapter = Adapter(kind, rank, alpha, dropout, seed, tuple(names), _digest(model), trained)
    config = _config(model, adapter, masks)
    with random_states():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator_for(seed, f"adapter:{kind}"))))
        peft.inject_adapter_in_model(config, model)
    for name in names:
        module: Any = model.get_submodule(name)
        if kind == "masked-lora":
            module.keep.copy_(masks[name])
    for parameter in model.parameters():
        if parameter.requires_grad and kind != "shira":  # shira adds to the weight, in its dtype
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    model.layerwise_adapter = adapter  # type: ignore[assignment]
    return model


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """The adapter's update in the weights, in place, and the linears as they were; what was pruned is zero bit for bit.

    Raises ModelError without an adapter, and for a quantized base: merged weights would not lie on its grid.
    """
    adapter = _adapter_of(model)
    if getattr(model, "layerwise_quantized", ()):
        raise ModelError(
            "the base is quantized: merged weights would leave its grid. Keep the adapter apart (save_adapter)."
        )
    for name in adapter.layers:
        module: Any = model.get_submodule(name)
        base = module.get_base_layer()
        old = base.weight.detach()
        wide = old.to(torch.promote_types(old.dtype, torch.float32))
        delta = module.get_delta_weight(NAME)
        delta = (delta.to_dense() if delta.is_sparse else delta).to(wide.dtype)
        merged = wide * (1 + delta) if adapter.kind == "hira" else wide + delta
        if (
            adapter.kind != "shira"
        ):  # its entries are kept ones, which may be zero in the base; beside them it adds nothing
            merged.masked_fill_(~module.keep if adapter.kind == "masked-lora" else old == 0, 0)
        base.weight.data.copy_(merged)
    _take_off(model, adapter)
    return model


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """The adapter alone: PEFT's files, which PEFT reads too (masked-lora: which it refuses), and what base it belongs to.

    Raises ModelError without an adapter, OutputError for a folder that cannot be written.
    """
    adapter, target = _adapter_of(model), Path(folder)
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=NAME)
    config = model.peft_config[NAME].to_dict()  # type: ignore[index, union-attr]
    if adapter.kind == "masked-lora":
        config["peft_type"] = "LAYERWISE_MASKED_LORA"
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        tensors = {f"{_PREFIX}{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        if adapter.kind == "masked-lora":
            masks = {name: model.get_buffer(f"{name}.keep").cpu() for name in adapter.layers}
            save_file(masks, target / KEEP)
        for file, content in (("adapter_config.json", config), (FILE, asdict(adapter))):
            (target / file).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f'adapter folder "{target}" cannot be written: {error.strerror}.') from error


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """What `save_adapter` wrote, on the model it belongs to; the outputs are those of the model that was saved.

    Raises ModelError for files that are not there or are damaged, and for weights other than those it was trained on.
    """
    source = Path(folder)
    try:
        facts = json.loads((source / FILE).read_text(encoding="utf-8"))
        given = Adapter(**{**facts, "layers": tuple(facts["layers"]), "trained": tuple(facts["trained"])})
        state = {name.removeprefix(_PREFIX): value for name, value in load_file(source / WEIGHTS).items()}
        keep = load_file(source / KEEP) if given.kind == "masked-lora" else None
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{source}: no adapter that layerwise wrote, or a damaged one ({error}).") from error
    own = {n for n, module in model.named_modules() if type(module) is nn.Linear and "weight" in module._parameters}
    if quantized_by_loader(model) and not own.issuperset(given.layers):
        raise ModelError(_BY_LOADER.format(type(model).__name__))
    if missing := [name for name in given.layers if name not in own]:
        raise ModelError(
            f'{source}: its base has a linear "{missing[0]}", which this model has not: give its own base.'
        )
    if _digest(model) != given.base:
        raise ModelError(
            f"{source}: trained on other weights than these. Give the model it was added to, in the dtype it was stored in or wider."
        )
    with_it = add_adapter(
        model, given.kind, given.rank, given.alpha, given.dropout, keep, _only(model, given.layers), given.seed
    )
    if damage := _fill(with_it, state):
        _take_off(with_it, given)
        raise ModelError(f"{source}: damaged: {damage}.")
    return with_it


def _fill(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Give the adapter these values; what does not fit, in words, else nothing."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, adapter_name=NAME)
    if odd := sorted(state.keys() ^ wanted.keys()):
        return f'"{odd[0]}" is in one of files and model alone'
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            return f'"{name}" is {tuple(state[name].shape)} in the files, {tuple(value.shape)} by its settings'
    set_peft_model_state_dict(model, state, adapter_name=NAME)
    return ""


def _take_off(model: nn.Module, adapter: Adapter) -> None:
    """The linears as they were, and the parameters that took gradients."""
    for name in adapter.layers:
        module: Any = model.get_submodule(name)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module.get_base_layer())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in adapter.trained)
    del model.layerwise_adapter, model.peft_config


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":  # installed but broken
            raise
        raise MissingExtra("adapters need peft: pip install 'layerwise[train]'.") from error
    return peft


def _check(kind: str, rank: int, alpha: float | None, dropout: float) -> None:
    if kind not in KINDS:
        raise ConfigError(f'adapter "{kind}": give {", ".join(KINDS[:-1])} or {KINDS[-1]}.')
    if rank < 1:
        raise ConfigError(f"adapter: rank={rank}: give at least 1.")
    if alpha is not None and (kind != "masked-lora" or not alpha > 0):
        raise ConfigError(f"adapter: alpha={alpha:g}: give a number above 0, and of masked-lora alone.")
    if not 0 <= dropout < 1 or (dropout and kind == "shira"):
        raise ConfigError(f"adapter: dropout={dropout:g}: give a share below 1; shira takes none.")


def _linears(model: nn.Module, structure: Structure | None) -> list[str]:
    found = structure if structure is not None else structure_of(model)
    names = [one.name for one in found.layers if one.block is not None and type(_module(model, one.name)) is nn.Linear]
    if not names and quantized_by_loader(model):
        raise ModelError(_BY_LOADER.format(type(model).__name__))
    if not names:
        raise ModelError(f"{type(model).__name__} has no plain linears in its blocks that an adapter could be put on.")
    return names


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter by itself
        return None


def _only(model: nn.Module, names: tuple[str, ...]) -> Structure:
    return structure_of(model, include=names)


def _digest(model: nn.Module) -> str:
    """Of everything that a file of the model would hold, the same in every dtype that holds the values exactly: an adapter on a base whose
    norms or embeddings differ gives other outputs, too."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        plain = value.detach()
        wide = plain.to(torch.promote_types(plain.dtype, torch.float32)) if plain.is_floating_point() else plain
        digest.update(f"{name}{tuple(wide.shape)}".encode())
        flat = wide.cpu().contiguous().flatten()
        digest.update(
            flat.view(torch.uint8).numpy().data if flat.numel() else b""
        )  # the bytes themselves, no copy of them
    return digest.hexdigest()[:32]


def _config(model: nn.Module, adapter: Adapter, masks: Mapping[str, Tensor]) -> Any:
    import peft

    names = list(adapter.layers)
    if adapter.kind == "hira":
        return peft.HiraConfig(r=adapter.rank, target_modules=names, hira_dropout=adapter.dropout)
    if adapter.kind == "shira":
        config = peft.ShiraConfig(r=adapter.rank, target_modules=names)
        # drawn before anything is put on: a layer that keeps too few leaves the model as it was
        of = {
            id(model.get_submodule(name)): entries_of(name, masks[name], adapter.rank, adapter.seed) for name in names
        }
        config.mask_fn = lambda base, rank, **_: of[id(base)]
        return config
    from .masked_lora import MaskedLoraLinear

    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=names, bias="none"
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    return config


def _adapter_of(model: nn.Module) -> Adapter:
    adapter: Adapter | None = getattr(model, "layerwise_adapter", None)
    if adapter is None:
        raise ModelError(f"this {type(model).__name__} has no adapter of layerwise: add_adapter, or load_adapter.")
    return adapter
