"""What goes with the weights: the model card section for people, layerwise.json for programs."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..engine import Result
from ..errors import ConfigError
from ..plan import Plan


def versions() -> dict[str, str]:
    """Package -> version of what made the weights."""
    found = {"python": platform.python_version()}
    for package in ("layerwise", "torch", "transformers", "diffusers", "safetensors", "compressed-tensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def as_stored(plan: Plan | None, result: Mapping[str, Any] | Result | None) -> Plan | None:
    """The plan with the bits that came of it: the solver may store other scales and zeros than it was counted with."""
    if plan is None or not isinstance(result, Result) or result.bits is None:
        return plan
    return plan.model_copy(update={"budget": plan.budget.model_copy(update={"achieved_bits": result.bits})})


def plain(result: Mapping[str, Any] | Result | None) -> Mapping[str, Any] | None:
    """The figures of a result as plain values. Raises ConfigError for what is neither a `Result` nor a mapping."""
    if isinstance(result, Result):
        return result.to_dict()
    if result is not None and not isinstance(result, Mapping):
        raise ConfigError(f"result is a {type(result).__name__}: give the Result of compress, or a dict of figures.")
    return result


def record(plan: Plan | None, result: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of layerwise.json: versions, seed, plan fingerprint, measured result, and `facts` about the saved files."""
    entry: dict[str, Any] = {"layerwise": 1, "versions": versions()}
    if plan is not None:
        entry["plan"] = {
            "file": "plan.yaml",
            "fingerprint": plan.fingerprint,
            "method": plan.method,
            "solver": plan.solver,
        }
        entry["seed"] = plan.method.get("seed", (plan.solver or {}).get("seed"))
    if result is not None:
        entry["result"] = dict(result)
    return entry | dict(facts)


def card(name: str, plan: Plan | None, result: Mapping[str, Any] | None, report: list[str], library: str | None) -> str:
    """README.md: front matter that the hub reads, then one section in plain words."""
    front = ["---", *([f"library_name: {library}"] if library else []), "tags: [layerwise, compressed]", "---"]
    lines = [*front, f"# {name}", "", "## Compression", ""]
    if plan is not None:
        base = f" from `{plan.model.name}`" if plan.model else ""
        lines += [
            f"Made{base} with layerwise {versions().get('layerwise', '')}. The whole decision is in `plan.yaml`.",
            "",
        ]
        lines += [f"- method: {_settings(plan.method)}"] if plan.method else []
        lines += [f"- budget: {_settings(plan.budget.model_dump(exclude_none=True))}"]
        lines += [f"- solver: {_settings(plan.solver)}"] if plan.solver else []
    lines += [f"- {line}" for line in report]
    if result:
        lines += [
            "",
            "| measured | value |",
            "|---|---|",
            *(f"| {key} | {_cell(value)} |" for key, value in _flat(result)),
        ]
    return "\n".join(lines) + "\n"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in values.items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return rows


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
