"""What a search tries: every method that shares a sparsity out, some at half and twice their spread."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..settings import nearest
from .base import Method

if TYPE_CHECKING:
    from .auto import Auto

_SPREADS = tuple({"spread": 0.3 * turn} for turn in (1.0, 0.5, 2.0))  # of methods that spread by a share of the target
# settings beside the method's own that are tried: its dial at the default, half and twice as far, or another order
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "random": ({"spread": 0.08}, {"spread": 0.04}, {"spread": 0.16}),
    "erk": ({"power": 1.0}, {"power": 0.5}, {"power": 2.0}),
    "owl": ({"spread": 0.08}, {"spread": 0.04}, {"spread": 0.16}),
    "alpha-pruning": _SPREADS,
    "farms": _SPREADS,
    "ecoflap": ({"order": "first"}, {"order": "zeroth"}),
}
# take minutes to hours on large models, so a time limit drops them first
LATE = ("grasp", "grasp-ratio", "alpha-pruning", "farms", "ecoflap", "synflow")


def candidates(auto: "Auto") -> dict[str, Method]:
    """Name -> method set up for this search: uniform and random first, then those that look at no data, the slow ones last."""
    from . import METHODS  # which has Auto in it

    shares = [name for name, kind in METHODS.items() if _takes_sparsity(kind) and name != auto.name]
    others = [name for name in shares if name not in ("uniform", "random")]
    asked = [name.strip() for name in auto.only.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in shares]:
        raise ConfigError(
            f'Auto.only="{auto.only}": "{unknown[0]}" is no method to try.{nearest(unknown[0], others)} Methods: {", ".join(others)}.'
        )
    # stable: else in the order of the table
    chosen = sorted(asked or others, key=lambda name: (name in LATE, METHODS[name].needs_data))
    made: dict[str, Method] = {}
    for name in ["uniform", "random", *(name for name in chosen if name not in ("uniform", "random"))]:
        made |= _variants(auto, name, METHODS[name])
    return made


def _takes_sparsity(kind: type[Method]) -> bool:
    """Whether it shares a sparsity out, and not in a pattern of its own, which a search for single weights has no use for."""
    defaults = {one.name: one.default for one in fields(kind)}  # type: ignore[arg-type]
    return "sparsity" in defaults and defaults.get("pattern", "unstructured") == "unstructured"


def _variants(auto: "Auto", name: str, kind: type[Method]) -> dict[str, Method]:
    """The method with the settings of the search that it knows, once for each of its variants."""
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {"sparsity": auto.sparsity, "seed": auto.seed}
    # a bound that was not asked for leaves the method its own
    bounds = {"min_sparsity": (auto.min_sparsity, 0.0), "max_sparsity": (auto.max_sparsity, 1.0)}
    given |= {key: value for key, (value, free) in bounds.items() if value != free}
    common = {key: value for key, value in given.items() if key in known}
    made = {}
    for more in VARIANTS.get(name, ({},)):
        words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in more.items()]
        made[" ".join([name, *words])] = kind(**common, **more)
    return made
