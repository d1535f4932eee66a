"""One file per method: how a budget is spread over the layers. Read one and you have read the recipe."""

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from .base import Method
from .erdos_renyi import ER, ERK, ERKPlus
from .owl import OWL
from .random_ratios import RandomRatios
from .uniform import Uniform
from .uniform_plus import UniformPlus

__all__ = [
    "ER",
    "ERK",
    "METHODS",
    "OWL",
    "ERKPlus",
    "Method",
    "RandomRatios",
    "Uniform",
    "UniformPlus",
    "method_from",
]

METHODS: dict[str, type[Method]] = {
    "uniform": Uniform,
    "uniform-plus": UniformPlus,
    "er": ER,
    "erk": ERK,
    "erk-plus": ERKPlus,
    "owl": OWL,
    "random": RandomRatios,
}


def method_from(name: str, **settings: Any) -> Method:
    """The method of this name with these settings, the others at their defaults.

    Raises ConfigError for an unknown name or setting, offering the nearest, for a value of the wrong type or outside its range.
    """
    if name not in METHODS:
        raise ConfigError(f'unknown method "{name}".{_nearest(str(name), METHODS)} Methods: {", ".join(METHODS)}.')
    chosen: Any = METHODS[name]
    kinds = {field.name: get_type_hints(chosen)[field.name] for field in dataclasses.fields(chosen)}
    for key, value in settings.items():
        if key not in kinds:
            known = f" It has {', '.join(kinds)}."
            raise ConfigError(f'method {name} has no setting "{key}".{_nearest(key, kinds)}{known}')
        settings[key] = _typed(name, key, value, kinds[key])
    method: Method = chosen(**settings)
    return method


def _typed(method: str, key: str, value: Any, kind: Any) -> Any:
    """The value in the type of its field. A whole number will do for any number; true and false are no numbers."""
    if get_origin(kind) is Literal:
        return value  # the class knows the words
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        wanted = next(words[one] for one in kinds if one in words)
        raise ConfigError(f"method {method}: {key}={value!r}: give {wanted}.")
    return value


def _nearest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
