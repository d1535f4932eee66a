"""What differs between two plans, given as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One difference between two plans. `layer` is None for what concerns the whole plan; None as a value: absent."""

    layer: str | None
    field: str  # dotted: prune.sparsity, budget.sparsity, method.window
    before: Any
    after: Any


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Change]:
    """Changes of model, method, budget and solver, then of the layers of `first`, then of layers that only `second` has."""
    changes = [
        Change(None, f"{key}.{field}", before, after)
        for key in ("model", "method", "budget", "solver")
        for field, before, after in _fields(first.get(key, {}), second.get(key, {}))
    ]
    before_layers, after_layers = first["layers"], second["layers"]
    for name in {**before_layers, **after_layers}:
        found = _fields(before_layers.get(name, {}), after_layers.get(name, {}))
        changes += [Change(name, field, before, after) for field, before, after in found]
    return changes


def _fields(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in {**before, **after}:
        one, two = before.get(key), after.get(key)
        if isinstance(one, Mapping) or isinstance(two, Mapping):
            nested = [value if isinstance(value, Mapping) else {} for value in (one, two)]
            found += _fields(nested[0], nested[1], f"{prefix}{key}.")
        elif one != two:
            found.append((f"{prefix}{key}", one, two))
    return found
