"""Turn a folder just written into one of factors: four tensors in the place of each weight that they stand for.

Each file is copied tensor by tensor under a name of its own, so that memory holds the new tensors of one file at most.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ModelError
from ..solvers.factors import PARTS, Factors
from .armor_linear import armor_linears, factored, is_turned, put_back, unfactorable
from .factored_read import ENTRY, FORMAT, RECORD, WEIGHT
from .targets import some_layers
from .weights import check_file, weight_files

OTHER_NAMES = "the files of this architecture name weights otherwise than the model does"
CHANGED = 2e-2  # relative distance from its factors' product from which on a weight has been changed, not rounded


class AllFactors(Mapping[str, Factors]):
    """Those handed over, and those of the linears in factors that a model has already. notes: layers that must stay dense, and why."""

    def __init__(self, model: nn.Module, given: Mapping[str, Factors] | None) -> None:
        self._own, self._given = armor_linears(model), given or {}
        reasons = unfactorable(model, (name for name in self._given if name not in self._own))
        self.notes = tuple(f"{name} saved dense: {why}" for name, why in reasons.items())
        self._turned = {name for name, one in self._own.items() if one.turned} | {
            name for name in self._given if name not in reasons and is_turned(model.get_submodule(name))
        }
        self._names = [*self._own, *(name for name in self._given if name not in self._own and name not in reasons)]

    def only(self, layer: str) -> bool:
        """Whether the model itself has the layer in factors."""
        return layer in self._own

    def absent(self, folder: Path) -> list[str]:
        """The layers whose weights the files of a folder do not name as the model does."""
        stored = {tensor.name for file in weight_files(folder) for tensor in check_file(file)}
        return [name for name in self if f"{name}.{PARTS[0] if self.only(name) else WEIGHT[1:]}" not in stored]

    def turned(self, layer: str) -> bool:
        """Whether its weight is stored (inputs, outputs)."""
        return layer in self._turned

    def entry(self, patterns: Mapping[str, str]) -> dict[str, object]:
        """What layerwise.json says of these layers in factors."""
        turned = [layer for layer in patterns if layer in self._turned]
        return {"format": FORMAT, "layers": dict(patterns)} | ({"turned": turned} if turned else {})

    def __getitem__(self, layer: str) -> Factors:
        return self._own[layer].factors if layer in self._own else self._given[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def in_factors(model: nn.Module, factors: Mapping[str, Factors]) -> Iterator[nn.Module]:
    """Within, the model runs these layers in factors."""
    new = {name: factors[name] for name in factors if name not in armor_linears(model)}
    replaced = factored(model, new)
    try:
        yield model
    finally:
        put_back(model, replaced)


def factor_folder(folder: Path, factors: AllFactors) -> tuple[dict[str, str], tuple[str, ...]]:
    """Rewrite the weight files of a folder and record what is in factors. Returns layer -> pattern, and notes.

    A layer whose weight the files name otherwise than the model stays dense, with a note; the folder is left alone if that is so of all.
    Raises ModelError if the files hold another weight than the factors give, or name a layer otherwise that the model has in factors only.
    """
    absent = factors.absent(folder)
    notes = (f"{some_layers(absent)} saved dense: {OTHER_NAMES}.",) if absent else ()
    if stuck := [layer for layer in absent if factors.only(layer)]:
        raise ModelError(f"{some_layers(stuck)} cannot be saved in factors: {OTHER_NAMES}. Save multiplied_out(model).")
    if len(absent) == len(factors):
        return {}, notes
    new_place: dict[str, str] = {}
    size, done = 0, dict[str, str]()
    files = weight_files(folder)
    for index, file in enumerate(files, start=1):
        tensors, inside = _in_factors(file, factors)
        done |= inside
        name = "factored.safetensors" if len(files) == 1 else f"factored-{index:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        new_place |= dict.fromkeys(tensors, name)
        del tensors  # it maps the file that is removed
        file.unlink()
    for old in folder.glob("*.safetensors.index.json"):
        old.unlink()
    index_file = {"metadata": {"total_size": size}, "weight_map": new_place}
    (folder / "factored.safetensors.index.json").write_text(json.dumps(index_file, indent=1), encoding="utf-8")
    (folder / RECORD).write_text(json.dumps({ENTRY: factors.entry(done)}), encoding="utf-8")
    return done, notes


def _in_factors(file: Path, factors: AllFactors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file with factors for weights, and layer -> pattern of those that are in it."""
    tensors: dict[str, Tensor] = {}
    done: dict[str, str] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            tensor = opened.get_tensor(name)
            layer, _, part = name.rpartition(".")
            if layer not in factors or part not in (*PARTS, WEIGHT[1:]):
                tensors[name] = tensor
                continue
            own = factors[layer].to("cpu")
            done[layer] = f"{own.n}:{own.m}"
            if part in PARTS:  # of a linear that was in factors when the model was written
                tensors[name] = tensor
                continue
            _check_same(layer, tensor.T if factors.turned(layer) else tensor, own)
            tensors |= {f"{layer}.{part}": getattr(own, part).contiguous() for part in PARTS}
    return tensors, done


def _check_same(layer: str, stored: Tensor, factors: Factors) -> None:
    product = factors.weight()
    away = float((stored.float() - product).norm()) if stored.shape == product.shape else float("inf")
    if not away <= CHANGED * float(product.norm()):
        raise ModelError(
            f'layer "{layer}": its weight is not what its factors give, so it was changed after they were computed.'
            " Save without factors, or compress it again."
        )
