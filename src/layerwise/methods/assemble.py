"""From sparsities to a plan, and the facts about a model that methods share."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from torch import nn

from ..allocate import Bound, exact_counts, sparsities_of
from ..errors import ConfigError, ModelError, SelectionError, ShapeError
from ..plan import Budget, ModelFacts, Plan, Prune, Treatment, Treatments
from ..structure import Layer, Structure, in_order, structure_of
from .base import Method


def found(model: nn.Module, structure: Structure | None) -> Structure:
    """The structure given, or that of the model. Raises ModelError if no layer is up for compression."""
    structure = structure_of(model) if structure is None else structure
    if not structure.layers:
        if any(type(module).__name__ == "ArmorLinear" for module in model.modules()):
            raise ModelError(
                f"{type(model).__name__}: no layer is up for compression: its layers are in factors. Multiply them out first:"
                " load(folder, dense=True), or layerwise.io.multiplied_out(model)."
            )
        raise ModelError(
            f"{type(model).__name__}: no layer is up for compression: it has no repeated blocks, or all of it is excluded."
            ' Name its layers: --include "*", in Python structure=structure_of(model, include=["*"]).'
        )
    return structure


def plan_of(
    method: Method,
    model: nn.Module,
    structure: Structure,
    sparsity: float,
    sparsities: Mapping[str, float],
    low: Bound = 0.0,
    high: Bound = 1.0,
    scores: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that prunes every layer of `structure`, unstructured, by whole weights that meet `sparsity` to the last.

    sparsities: layer name -> sparsity, mean `sparsity` by weight, within low and high. Raises BudgetError otherwise.
    """
    sizes = sizes_of(structure)
    counts = exact_counts(sparsities, sizes, sparsity, low, high)
    prunes = {name: Prune(sparsity=exact) for name, exact in sparsities_of(counts, sizes).items()}
    return plan_with(method, model, structure, sparsity, prunes, scores, notes)


def plan_with(
    method: Method,
    model: nn.Module,
    structure: Structure,
    sparsity: float,
    prunes: Mapping[str, Prune],
    scores: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan with these treatments, the model's facts and the sparsity it achieves."""
    return named_plan(method, model, structure, Budget(sparsity=sparsity), prunes, scores, notes)


def named_plan(
    method: Method,
    model: nn.Module,
    structure: Structure,
    budget: Budget,
    treatments: Mapping[str, Treatment],
    scores: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan with these treatments, the model's facts and what it achieves of the budget."""
    plan = Plan(
        model=facts_of(model, structure),
        method=method,
        budget=budget,
        layers=dict(treatments),
        scores=dict(scores or {}),
        notes=tuple(notes),
    )
    return plan.with_achieved(structure.layers)


def facts_of(model: nn.Module, structure: Structure) -> ModelFacts:
    """What a plan says of the model it was made for."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    if Path(name).is_absolute() or Path(name).is_dir():  # a plan is for every machine: not where it lies on this one
        name = Path(name).resolve().name
    return ModelFacts(name=name, parameters=structure.parameters, fingerprint=structure.fingerprint)


def block_of(owner: str, pattern: str) -> tuple[int, int]:
    """(rows, columns) of a block pattern. Raises ConfigError for any other."""
    try:
        block = Prune(sparsity=0.0, pattern=pattern).block
    except ValidationError:
        block = None
    if block is None:
        raise ConfigError(f'{owner}.pattern="{pattern}": give a block, outputs x inputs, such as block(16x16).')
    return block


def dividing(structure: Structure, prune: Prune, indivisible: Literal["error", "dense"]) -> list[Layer]:
    """The layers that the pattern divides. Raises ShapeError naming the others, unless they may stay dense and are not all."""
    odd = [layer for layer in structure if Treatments(prune=prune).problems(layer.rows, layer.columns)]
    if odd and (indivisible == "error" or len(odd) == len(structure.layers)):
        raise ShapeError(_indivisible(prune.pattern, odd, len(structure.layers)))
    left = {layer.name for layer in odd}
    return [layer for layer in structure if layer.name not in left]


def _indivisible(pattern: str, odd: Sequence[Layer], layers: int) -> str:
    shown = ", ".join(f'"{layer.name}" ({layer.rows} x {layer.columns})' for layer in odd[:4])
    more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    if len(odd) == layers:
        return f"pattern {pattern} divides none of the {layers} layers: {shown}{more}. Use another pattern, or unstructured."
    return (
        f"pattern {pattern} does not divide {len(odd)} of {layers} layers (outputs x inputs): {shown}{more}."
        ' Exclude them (--exclude), or leave them dense: indivisible="dense" (--set indivisible=dense).'
    )


def sizes_of(structure: Structure) -> dict[str, int]:
    """Layer name -> weights, in the order of the structure."""
    return {layer.name: layer.size for layer in structure.layers}


def shape_of(layer: Layer) -> tuple[int, ...]:
    """(out, in, kernel...) of one of the layer's matrices; of a convolution (out, in/groups, kernel...) as it is stored."""
    return layer.shape if layer.kind == "conv" else (layer.rows, layer.columns)


def last_of(model: nn.Module, structure: Structure) -> Layer:
    """The head where it is up for compression, else the last layer in the order of the model."""
    layers = in_order(model, structure)
    return next((layer for layer in reversed(layers) if layer.role == "head"), layers[-1])


def named(structure: Structure, name: str) -> str:
    """The name itself. Raises SelectionError, offering the nearest, if no layer up for compression has it."""
    names = [layer.name for layer in structure]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise SelectionError(f'"{name}" is none of the {len(names)} layers. The nearest name is "{close[0]}".')
    return name
