"""The work folder: every finished block is written to it at once, so that a killed run goes on where it was.

`run.json` says which run it belongs to; a folder of another run is refused, with the difference. `blocks/` has one safetensors
file per block, another one for the codes of quantized layers, and beside them what was reported about its layers. Files appear whole
(written aside, synced, renamed). `lock` is there while a run is at work: a second one with the same folder is refused.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError, OutputError, SaveError
from ..files import into_place, whole_file
from ..solvers.codes import Codes
from ..solvers.factors import PARTS as FACTORS
from ..solvers.factors import Factors
from .events import BlockTuned, LayerSolved
from .lock import FileLock

CODES = ("values", "scale", "zero")  # the tensors of codes

T = TypeVar("T")


class Work(AbstractContextManager["Work"]):
    """A work folder, ours alone within the context (only the first of several ranks locks it). Raises ConfigError if it is in use."""

    def __init__(self, folder: str | Path, *, lock: bool = True) -> None:
        self.folder = Path(folder)
        self._lock = FileLock(self.folder / "lock") if lock else None
        self._made: list[Path] = []  # folders that go again if nothing is left in them, the innermost first

    def __enter__(self) -> "Work":
        if self._lock is None:
            return self
        try:
            self._made = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            ours = self._lock.take()
        except OSError as error:
            raise OutputError(f'work folder "{self.folder}" cannot be made or locked: {error.strerror}.') from error
        if not ours:
            raise ConfigError(
                f'work folder "{self.folder}": another run is using it. Wait for that to end, or give a folder of its own (--work).'
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        self._lock.release()
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something is in it
                break

    def begin(self, key: Mapping[str, str]) -> None:
        """The folder is of the run that `key` describes (plain facts: model, plan, solver, data, seed, versions), or ConfigError."""
        try:
            (self.folder / "blocks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f'work folder "{self.folder}" cannot be made: {error.strerror}.') from error
        run = self.folder / "run.json"
        if not run.exists():
            write_whole(run, json.dumps(dict(key), indent=1).encode())
            return
        try:
            before = dict(json.loads(run.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"{run}: not readable; remove the work folder to start again.") from error
        if changed := sorted(name for name in {*before, *key} if before.get(name) != key.get(name)):
            details = "; ".join(f"{name}: {before.get(name)} then, {key.get(name)} now" for name in changed)
            raise ConfigError(f"{self.folder}: belongs to another run ({details}). Use another folder, or remove it.")

    def clear(self) -> None:
        """Remove what the engine made; the folder itself goes with the context, unless it holds anything else."""
        shutil.rmtree(self.folder / "blocks", ignore_errors=True)
        for file in (self.folder / "run.json", *self.folder.glob(".run.json.partial*")):
            file.unlink(missing_ok=True)
        if self.folder not in self._made:
            self._made.insert(0, self.folder)

    @property
    def count(self) -> int:
        """How many blocks are finished."""
        return len(list((self.folder / "blocks").glob("*.json")))

    def path(self, block: str) -> Path:
        return self.folder / "blocks" / f"{block}.safetensors"

    def _other_path(self, block: str, kind: str) -> Path:
        """kind: "codes" or "factors"."""
        return self.folder / "blocks" / f"{block}.{kind}"

    def finished(self, block: str) -> bool:
        """The report is written last: where it is, the weights are whole."""
        return self.path(block).with_suffix(".json").exists()

    def write(
        self,
        block: str,
        tensors: Mapping[str, Tensor],
        events: Sequence[LayerSolved],
        tuned: BlockTuned | None = None,
    ) -> None:
        """tensors: full parameter name -> weight."""
        _write_tensors(self.path(block), tensors)
        for kind, parts in (("codes", CODES), ("factors", FACTORS)):
            if held := {event.layer: one for event in events if (one := getattr(event, kind)) is not None}:
                tensors = {f"{name}.{part}": getattr(one, part) for name, one in held.items() for part in parts}
                _write_tensors(self._other_path(block, kind), tensors)
        report = {"layers": [_plain(event) for event in events], "tuned": tuned and dataclasses.asdict(tuned)}
        write_whole(self.path(block).with_suffix(".json"), json.dumps(report).encode())

    def codes_of(self, block: str, layer: str) -> Codes:
        """Those of one quantized layer of a finished block. Raises ConfigError if they cannot be read."""
        with self._readable(block):
            facts = {event["layer"]: event["codes"] for event in self._report(block)["layers"]}
            return self._codes(block, {layer: facts[layer]})[layer]

    def factors_of(self, block: str, layer: str) -> Factors:
        """Those of one factorized layer of a finished block. Raises ConfigError if they cannot be read."""
        with self._readable(block):
            facts = {event["layer"]: event["factors"] for event in self._report(block)["layers"]}
            return self._factors(block, {layer: facts[layer]})[layer]

    def _report(self, block: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.path(block).with_suffix(".json").read_text(encoding="utf-8"))
        return report

    @contextmanager
    def _readable(self, block: str) -> Iterator[None]:
        """What is wrong with the files of a block, in one line."""
        try:
            yield
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{self.path(block)}: damaged ({reason}). Remove the work folder to start again."
            ) from error

    def _codes(self, block: str, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Codes]:
        """Those of the quantized layers of a finished block. facts: what else the report says of each."""
        if not facts:
            return {}
        with safe_open(self._other_path(block, "codes"), framework="pt") as file:
            return {
                name: Codes(
                    *(file.get_tensor(f"{name}.{part}").clone() for part in CODES),
                    **{**of_layer, "scale_dtype": getattr(torch, of_layer["scale_dtype"])},
                )
                for name, of_layer in facts.items()
            }

    def _factors(self, block: str, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Factors]:
        """Those of the factorized layers of a finished block."""
        if not facts:
            return {}
        with safe_open(self._other_path(block, "factors"), framework="pt") as file:
            return {
                name: Factors(**{part: file.get_tensor(f"{name}.{part}").clone() for part in FACTORS}, **of_layer)
                for name, of_layer in facts.items()
            }

    def read_into(self, model: nn.Module, block: str) -> list[LayerSolved | BlockTuned]:
        """Put a finished block's weights into the model; returns what was reported about it."""
        with self._readable(block):
            with safe_open(self.path(block), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    parameter = model.get_parameter(name)
                    parameter.data.copy_(file.get_tensor(name))
            whole = self._report(block)
            report, tuned = whole["layers"], whole["tuned"]
            codes = self._codes(block, {event["layer"]: event["codes"] for event in report if event.get("codes")})
            factors = self._factors(
                block, {event["layer"]: event["factors"] for event in report if event.get("factors")}
            )
            solved = [
                LayerSolved(
                    **{
                        **event,
                        "notes": tuple(event["notes"]),
                        "codes": codes.get(event["layer"]),
                        "factors": factors.get(event["layer"]),
                    }
                )
                for event in report
            ]
            return [*solved, *([BlockTuned(**tuned)] if tuned else [])]


class Kept(Mapping[str, T]):
    """Codes or factors of the layers of finished blocks, each read from the work folder when it is asked for. places: layer -> block."""

    def __init__(self, read: Callable[[str, str], T], places: Mapping[str, str]) -> None:
        self._read, self._places = read, dict(places)

    def __getitem__(self, layer: str) -> T:
        return self._read(self._places[layer], layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _plain(event: LayerSolved) -> dict[str, Any]:
    """For JSON, the tensors of codes and factors left out."""
    codes, facts = event.codes, None
    if codes is not None:
        facts = {
            field.name: getattr(codes, field.name) for field in dataclasses.fields(codes) if field.name not in CODES
        }
        facts["scale_dtype"] = str(codes.scale_dtype).removeprefix("torch.")
    factors = event.factors and {"n": event.factors.n, "m": event.factors.m}
    plain = dataclasses.asdict(dataclasses.replace(event, codes=None, factors=None))
    return {**plain, "codes": facts, "factors": factors}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_suffix(".partial")
    try:
        save_file(whole, partial, metadata={"format": "pt"})
        into_place(partial, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        partial.unlink(missing_ok=True)
        raise SaveError(f"{path}: cannot write: {error}.") from error


def write_whole(path: Path, content: bytes) -> None:
    """The file has all of `content` or is not there, also after a power cut. Raises SaveError (disk full, no permission)."""
    try:
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise SaveError(f"{path}: cannot write {len(content)} bytes: {error.strerror}.") from error
