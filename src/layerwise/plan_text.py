"""How a plan is written and read: YAML with one line a layer, or JSON; and problems in words.

Numbers and words follow YAML 1.2. Under YAML 1.1, PyYAML's rule, `pattern: 2:4` would be the number 124 (base 60), `1e-3` a string and
`on` a boolean. Keys are always names, so a layer called `0` or `no` needs no quotes.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from .errors import PlanError
from .settings import nearest


def to_yaml(plain: Mapping[str, Any], by_line: Iterable[str]) -> str:
    """One line per key, and one per entry of the keys `by_line`, so that plans can be read, edited and compared by line."""
    lines = []
    for key, value in plain.items():
        if key in by_line:
            lines.append(f"{key}:" if value else f"{key}: {{}}")
            lines += [f"  {_flow(name)}: {_flow(entry)}" for name, entry in value.items()]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def parse(text: str, source: str) -> dict[str, Any]:
    """The mapping in YAML or JSON text. Raises PlanError with the line where it goes wrong."""
    if not text.strip():
        raise PlanError(f"{source}: it is empty. A plan is a mapping that starts with 'layerwise: 1'.")
    data = mapping_of(text, source)
    if "layerwise" not in data:
        raise PlanError(f"{source}: a plan is a mapping that starts with 'layerwise: 1', the version of its format.")
    return data


def mapping_of(text: str, source: str) -> dict[str, Any]:
    """The mapping in YAML text, or JSON where `source` ends so, {} where it is none. Raises PlanError with the line where it goes wrong."""
    try:
        data = _parse_json(text) if source.endswith(".json") else yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        tab = "\\t" in str(error.problem) or _has_tab(text, error)
        hint = " Use spaces, not tabs." if tab else ""
        raise PlanError(f"{source}{where}: not valid YAML: {error.problem}.{hint}") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{source}: not valid YAML: {str(error).splitlines()[0]}.") from error
    except json.JSONDecodeError as error:
        raise PlanError(f"{source}, line {error.lineno}: not valid JSON: {error.msg}.") from error
    except ValueError as error:  # Python refuses to read whole numbers of thousands of digits
        raise PlanError(f"{source}: it holds a number that cannot be read: {str(error).partition(';')[0]}.") from error
    except RecursionError as error:
        raise PlanError(f"{source}: nested too deeply to be a plan.") from error
    return data if isinstance(data, dict) else {}


def describe(source: str, problem: Mapping[str, Any], record: type[BaseModel] | None) -> str:
    """One line for a pydantic error: where, the value, what would be right. `record` is what holds the wrong key."""
    location = [str(part) for part in problem["loc"]]
    in_layer = location[:1] == ["layers"] and len(location) > 1
    path = ".".join(location[2:] if in_layer else location)
    start = f'{source}: layer "{location[1]}"' if in_layer else source
    key = location[-1] if location else ""
    if problem["type"] == "extra_forbidden":
        known = list(record.model_fields) if record else []
        hint = nearest(key, known) or " Known keys: " + ", ".join(known) + "."
        return f'{start}: unknown key "{path}".{hint}'
    if problem["type"] == "missing":
        return f'{start}: "{path}" is missing{_right(record, key)}.'
    message = str(problem["msg"]).removeprefix("Value error, ")
    if isinstance(problem["input"], (Mapping, BaseModel)):
        return f"{start}: {path}{': ' if path else ''}{message}.".replace(": : ", ": ")
    return f"{start}: {path} {_short(problem['input'])}{_right(record, key) or f': {message}'}."


def _right(record: type[BaseModel] | None, key: str) -> str:
    field = record.model_fields.get(key) if record else None
    return f": {field.description}" if field and field.description else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flow(value: Any) -> str:
    def dump(style: str | None) -> str:
        text = yaml.dump(
            value,
            Dumper=_Dumper,
            default_flow_style=True,
            default_style=style,
            sort_keys=False,
            width=10**9,
            allow_unicode=True,
        )
        return text.removesuffix("\n").removesuffix("\n...")  # a bare scalar ends its document with "..."

    text = dump(None)
    # double quotes write every kind of line break as an escape
    return dump('"') if len(text.splitlines()) > 1 else text


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise json.JSONDecodeError(f'"{key}" is given twice', text, text.rfind(f'"{key}"'))
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def _has_tab(text: str, error: yaml.MarkedYAMLError) -> bool:
    lines = text.splitlines()
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark]
    return any("\t" in lines[mark.line] for mark in marks if mark.line < len(lines))


_WORDS = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
}  # the core schema of YAML 1.2; int stands before float, which would take whole numbers too


class _Loader(yaml.SafeLoader):
    """YAML 1.2 words, keys as names, and a key given twice refused: plain YAML would keep the last in silence."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (yaml's own shape)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in found:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            found[key.value] = self.construct_object(value, deep=deep)
        return found

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)  # YAML 1.1 would read 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes what either rule, 1.1 or 1.2, would not read back as the same string."""

    def ignore_aliases(self, data: object) -> bool:
        """No anchors: every entry is written out."""
        return True


for _tag, (_pattern, _first) in _WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    if _tag == "float":  # 1.1 takes 1e-05 for a string and would leave it bare
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
