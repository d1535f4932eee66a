"""What `fastest` did with each layer, and why, with the times it decided by."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class LayerSpeed:
    """One layer. Times are milliseconds of one call on the device that the report names; None where nothing was measured.

    form: "dense", or a name of `candidates.FORMS`. looks: its zeros in words. rows: of input, in one call. ratio: how many times as fast
    as dense, the median over rounds. error: relative difference of the outputs from the dense ones (Frobenius norm). bytes: of what the
    form stores. tried: form -> ratio, the fastest first. refused: form -> why it could not be tried, or not be taken whatever its time.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    looks: str
    form: str
    why: str
    rows: int | None
    dense_bytes: int
    bytes: int
    dense_ms: float | None = None
    ms: float | None = None
    ratio: float | None = None
    error: float | None = None
    tried: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeedReport:
    """All layers as they are now, and the whole model. Its times are None where everything stayed dense: then nothing became faster.

    ratio: dense over fast of whole forward passes, median over rounds; low: lower quartile. error: relative, of the model's output.
    """

    layers: tuple[LayerSpeed, ...]
    why: str
    dense_ms: float | None = None
    ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    error: float | None = None
    protocol: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def forms(self) -> dict[str, int]:
        """Form -> number of layers that have it."""
        return dict(Counter(layer.form for layer in self.layers))

    @property
    def bytes(self) -> tuple[int, int]:
        """Of all layers: (dense, as they are now)."""
        return sum(layer.dense_bytes for layer in self.layers), sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**asdict(self), "forms": self.forms, "bytes": self.bytes}

    def summary(self) -> str:
        """The whole model in a line."""
        forms = ", ".join(f"{count} × {form}" for form, count in sorted(self.forms.items()))
        if self.ratio is None:
            return f"{forms}. {self.why}"
        times = f"a whole pass takes {self.ms:.2f} ms instead of {self.dense_ms:.2f}: {self.ratio:.2f} times as fast"
        return f"{forms}; {times} (lower quartile {self.low:.2f}). {self.why}"

    def __str__(self) -> str:
        """A table in plain text."""
        lines = [HEAD, *(cells(layer) for layer in self.layers)]
        widths = [max(len(line[at]) for line in lines) for at in range(len(HEAD))]
        text = ["  ".join(_aligned(at, cell, widths[at]) for at, cell in enumerate(line)).rstrip() for line in lines]
        how = ", ".join(f"{name} {value}" for name, value in self.protocol.items())
        return "\n".join([*text, "", self.summary(), f"measured with: {how}"])


HEAD = ["layer", "shape", "zeros", "form", "dense ms", "ms", "× as fast", "why"]
NUMBERS = (4, 5, 6)  # columns of HEAD


def cells(layer: LayerSpeed) -> list[str]:
    """One row of the table, a string for each of HEAD."""
    figures = ((layer.dense_ms, ".3f"), (layer.ms, ".3f"), (layer.ratio, ".2f"))
    times = ["–" if value is None else f"{value:{form}}" for value, form in figures]
    return [layer.name, " × ".join(map(str, layer.shape)), layer.looks, layer.form, *times, layer.why]


def _aligned(at: int, cell: str, width: int) -> str:
    return cell.rjust(width) if at in NUMBERS else cell.ljust(width)


def line_of(error: Exception) -> str:
    """Its class and the first line of what it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:120]}".rstrip(": ")
