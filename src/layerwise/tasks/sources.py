"""Reading the documents of a text source: a file, `python-docs`, or a dataset of the hub.

| source                          | documents                                                                  |
|---------------------------------|----------------------------------------------------------------------------|
| `python-docs`                   | the interpreter's own library; the split keeps held-out modules apart      |
| `*.jsonl`, `*.json` (also `.gz`) | one per line: the field `text`, or the only field that holds a string      |
| `*.parquet`                     | one per row, same field rule                                               |
| `hub:NAME[:CONFIG[:SPLIT]]`     | the first 50,000 rows, in order, same field rule                           |
| any other file                  | the whole file, UTF-8, as one running text                                 |
"""

import gzip
import json
import platform
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from ..errors import DataError, MissingExtra
from .python_docs import python_docs

Split = Literal["calibration", "held-out"]
Facts = dict[str, str | int | float | bool]

HUB_DOCUMENTS = 50_000  # C4 alone has hundreds of millions; a fixed prefix is the same for everyone


@dataclass(frozen=True)
class Documents:
    """The texts of one source. `running`: one continuous text, not separate documents. `facts` go into the protocol."""

    texts: list[str]
    running: bool
    facts: Facts


def read_documents(source: str | Path, split: Split) -> Documents:
    """Every document of `source`, in order, blank ones included. Raises DataError in one line for anything unusable."""
    name = str(source)
    if name == "python-docs":
        facts: Facts = {"source": name, "split": split, "python": platform.python_version()}
        try:
            return Documents([text for _, text in python_docs(split)], running=False, facts=facts)
        except FileNotFoundError as error:
            raise DataError(str(error)) from error
    if name.startswith("hub:"):
        return _from_hub(name, split)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{name}: no such data file. Give a .txt, .jsonl or .parquet file, python-docs, or hub:NAME.")
    if not path.is_file():
        raise DataError(f"{name}: this is a folder; text data is one file. Give the file.")
    return _from_file(path)


def _from_file(path: Path) -> Documents:
    name = path.name.lower().removesuffix(".gz")
    running = False
    if name.endswith((".jsonl", ".json")):
        texts = list(_texts(_json_lines(path), str(path), "line"))
    elif name.endswith(".parquet"):
        texts = list(_texts(_parquet_rows(path), str(path), "row"))
    else:
        texts, running = [_decode(path)], True
    if not any(text.strip() for text in texts):
        raise DataError(f"{path}: the file holds no text. Give a file with text in it.")
    return Documents(texts, running, {"source": str(path), "split": "whole file"})


def _decode(path: Path) -> str:
    """The bytes as they are, no translation of line ends: another string would be another perplexity."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {data[error.start]:#04x} at position {error.start}). Convert the file to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}: line {number} is not JSON ({error.msg}). Give one JSON object per line."
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
            raise DataError(
                f"{path}: line {number} cannot be read as JSON: {_first_line(error).partition(';')[0]}."
            ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "pyarrow":
            raise
        raise MissingExtra(f"{path}: Parquet needs pyarrow: pip install 'layerwise[data]'.") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_first_line(error)}.") from error
    yield from enumerate(rows, start=1)


def _from_hub(name: str, split: Split) -> Documents:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":  # installed but broken: do not tell the user to install it
            raise
        raise MissingExtra(f"{name}: hub datasets need datasets: pip install 'layerwise[data]'.") from error
    dataset, config, part = (*name.removeprefix("hub:").split(":"), "", "")[:3]
    part = part or ("train" if split == "calibration" else "test")
    try:
        rows = list(islice(datasets.load_dataset(dataset, config or None, split=part, streaming=True), HUB_DOCUMENTS))
    except Exception as error:  # connection, missing dataset, wrong config or split: each library raises its own
        raise DataError(
            f"{name}: cannot be read ({type(error).__name__}: {_first_line(error)}). "
            "Write hub:NAME:CONFIG:SPLIT, or give a local file when offline."
        ) from error
    texts = list(_texts(iter(enumerate(rows, start=1)), name, "row"))
    if not any(text.strip() for text in texts):
        raise DataError(f"{name}: split {part} holds no text.")
    return Documents(texts, running=False, facts={"source": name, "split": part})


def _texts(records: Iterator[tuple[int, object]], source: str, unit: str) -> Iterator[str]:
    """The text field of every record; the first record decides which field that is."""
    field: str | None = None
    for number, record in records:
        if not isinstance(record, Mapping):
            raise DataError(
                f"{source}: {unit} {number} is not an object with fields. Give objects with a field `text`."
            )
        field = field or _text_field(record, source)
        value = record.get(field)
        if not isinstance(value, str):
            raise DataError(f"{source}: {unit} {number} has no text in field `{field}`. Every {unit} needs it.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: {unit} {number} holds half a character (\\u{ord(value[error.start]):04x}), which no tokenizer takes."
                " Remove it."
            ) from error
        yield value


def _text_field(record: Mapping[str, object], source: str) -> str:
    if isinstance(record.get("text"), str):
        return "text"
    strings = [name for name, value in record.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    found = f"several fields hold strings ({', '.join(strings)})" if strings else "no field holds a string"
    raise DataError(f"{source}: no field `text`, and {found}. Rename the one to use to `text`.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
