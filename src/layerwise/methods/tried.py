"""What a search has tried, kept in a file as it goes, so that a search that was killed goes on."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.work import write_whole
from ..errors import ConfigError


@dataclass(frozen=True)
class Tried:
    """One candidate. divergence: mean KL from the dense model in nats on the data searched on, or None with the reason why not.
    unseen: the same on data kept for the verdict, for those that got so far. seconds: planning, pruning and judging."""

    name: str
    divergence: float | None = None
    unseen: float | None = None
    seconds: float = 0.0
    reason: str = ""

    def with_unseen(self, divergences: Sequence[float] | None) -> "Tried":
        return self if divergences is None else replace(self, unseen=sum(divergences) / len(divergences))


class Record:
    """The file of one search; without a path nothing is kept. Raises ConfigError if the file is another search's."""

    def __init__(self, path: Path | None, key: Mapping[str, str]) -> None:
        self.path, self.key = path, dict(key)
        self._tried: dict[str, Tried] = {}
        if path is None or not path.exists():
            return
        try:
            entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found, tried = entry["search"], {one["name"]: Tried(**one) for one in entry["tried"]}
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ConfigError(f"{path}: no readable record of a search; remove it to start again.") from error
        if changed := sorted(name for name in {*found, *self.key} if found.get(name) != self.key.get(name)):
            details = "; ".join(f"{name}: {found.get(name)} then, {self.key.get(name)} now" for name in changed)
            raise ConfigError(f"{path}: belongs to another search ({details}). Use another file, or remove it.")
        self._tried = tried

    def get(self, name: str) -> Tried | None:
        return self._tried.get(name)

    def add(self, tried: Tried) -> None:
        """Keep it; the file is replaced whole. Raises SaveError if it cannot be written."""
        self._tried[tried.name] = tried
        if self.path is not None:
            entry = {"search": self.key, "tried": [asdict(one) for one in self._tried.values()]}
            write_whole(self.path, f"{json.dumps(entry, indent=1)}\n".encode())


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """(mean of before - after, its standard error) over the same batches; the error of a single pair is 0."""
    gains = [b - a for b, a in zip(before, after, strict=True)]
    if not all(math.isfinite(gain) for gain in gains):
        return (-math.inf if any(math.isinf(a) for a in after) else math.inf), 0.0
    mean = sum(gains) / len(gains)
    if len(gains) < 2:
        return mean, 0.0
    variance = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    return mean, math.sqrt(variance / len(gains))
