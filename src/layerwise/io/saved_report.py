"""What the files of a saved model hold, counted in them, and in plain words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .factored_read import FactoredReport, factored_report
from .packed_report import PackedReport, packed_report
from .weights import weight_files
from .zeros import count_zeros


@dataclass(frozen=True)
class SavedReport:
    """What the files hold, counted in them. Bytes are of the weight files alone.

    before: bytes of the dense model's weight files, where they are known.
    """

    bytes: int
    before: int | None
    zeros: int
    values: int  # in floating-point tensors of two or more dimensions
    packed: PackedReport | None = None
    factored: FactoredReport | None = None
    notes: tuple[str, ...] = ()  # layers whose codes or factors are not stored as they were handed over
    widened: Mapping[str, int] = field(default_factory=dict)  # bits as stored of the layers that were solved in fewer

    def as_stored(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The result, with the true bits of the files beside those that were solved where they differ."""
        return {**result, **({"stored_bits": self.packed.bits} if self.packed and self.widened else {})}

    def lines(self) -> list[str]:
        """In plain words: what became smaller, and what did not."""
        share = f"{self.zeros / self.values:.1%}" if self.values else "none"
        lines = [
            f"Weights on disk: {self.bytes:,} bytes"
            + (f", {self.before:,} before." if self.before is not None else "."),
            f"Zeros counted in the files: {self.zeros:,} of {self.values:,} values in matrices ({share}).",
        ]
        if (
            self.zeros
            and not self.packed
            and not self.factored
            and (self.before is None or abs(self.bytes - self.before) <= 0.02 * self.before)
        ):
            lines.append("Zeros do not shrink this format and do not speed up a stock engine: same bytes, same speed.")
        if self.before is not None and self.bytes > 1.02 * self.before:
            lines.append("Larger than before: what was packed there was read as dense numbers, and is saved so.")
        parts = [part for part in (self.packed, self.factored) if part is not None]
        return [*lines, *(line for part in parts for line in part.lines()), *self.notes]


def saved_report(
    folder: str | Path,
    *,
    before: int | None = None,
    notes: tuple[str, ...] = (),
    widened: Mapping[str, int] | None = None,
) -> SavedReport:
    """Count bytes and zeros in the files of a saved model. Raises ModelError if it has no weights."""
    counts = [(zeros, math.prod(shape)) for zeros, shape in count_zeros(Path(folder)).values() if len(shape) > 1]
    size = sum(file.stat().st_size for file in weight_files(Path(folder)))
    zeros, values = sum(zeros for zeros, _ in counts), sum(values for _, values in counts)
    packed, factored = packed_report(Path(folder)), factored_report(Path(folder))
    return SavedReport(size, before, zeros, values, packed, factored, notes, widened or {})
