"""Settings by name, as plans and the command line give them: checked against the dataclass that they are for.

Methods and solvers are frozen dataclasses of plain values in a table of names; what is wrong with a name, a setting or its type is
said here, in one line, for both. Values outside their range are the dataclass's own business.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def build(what: str, table: Mapping[str, type[T]], name: object, settings: Mapping[str, Any]) -> T:
    """`table[name]` with these settings, the others at their defaults. what: "method", "solver"; for messages.

    Raises ConfigError for an unknown name or setting, offering the nearest, and for a value of the wrong type.
    """
    if not isinstance(name, str) or name not in table:
        raise ConfigError(
            f'unknown {what} "{name}".{nearest(str(name), table)} {what.capitalize()}s: {", ".join(table)}.'
        )
    chosen: Any = table[name]
    hints = get_type_hints(chosen)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(chosen)}
    given = {}
    for key, value in settings.items():
        if key not in kinds:
            known = f"It has {', '.join(kinds)}." if kinds else "It has none."
            raise ConfigError(f'{what} {name} has no setting "{key}".{nearest(key, kinds)} {known}')
        given[key] = _typed(f"{what} {name}: {key}", value, kinds[key])
    made: T = chosen(**given)
    return made


def pairs(words: Sequence[str], where: str) -> dict[str, Any]:
    """["a=1", "b=true", "c=x"] -> {"a": 1, "b": True, "c": "x"}. Raises ConfigError for a word without "=" or a name given twice."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f'{where} "{word}": write NAME=VALUE.')
        name = key.strip().replace("-", "_")
        if name in found:
            raise ConfigError(f"{where} {name}=: given twice. Give it once.")
        found[name] = _value(value.strip())
    return found


def words_of(settings: Any) -> str:
    """ "a=1,b=true": the fields of a settings dataclass that are not at their defaults, as `pairs` reads them."""
    changed = {
        one.name: value for one in dataclasses.fields(settings) if (value := getattr(settings, one.name)) != one.default
    }
    return ",".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changed.items()
    )


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """' Did you mean "…"?' for the nearest of the known words, upper and lower case alike, or nothing."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=cutoff)
    return f' Did you mean "{by_lower[close[0]]}"?' if close else ""


def _typed(where: str, value: Any, kind: Any) -> Any:
    """The value in the type of its field. A whole number will do for any number; true and false are no numbers."""
    if get_origin(kind) is Literal:
        return value  # the class knows the words, and what each means
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise ConfigError(f"{where}={value!r}: give {next(_WORDS[one] for one in kinds if one in _WORDS)}.")
    return value


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
