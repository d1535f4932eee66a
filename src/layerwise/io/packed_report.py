"""What a packed folder holds, counted in its files: layers by bits, true bits per weight; and in plain words who gains by it."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .packed_read import packed_folder
from .weights import check_file


@dataclass(frozen=True)
class PackedReport:
    """by_bits: bits of the codes -> layers. bytes: of codes, scales and zeros. weights: how many these stand for."""

    by_bits: dict[int, int]
    bytes: int
    weights: int

    @property
    def bits(self) -> float:
        """True bits per packed weight: scales and zeros counted, as stored."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "bits": self.bits}

    def lines(self) -> list[str]:
        """What was packed, and what that does not give."""
        layers = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(self.by_bits.items()))
        return [
            f"Packed (compressed-tensors pack-quantized): {sum(self.by_bits.values())} layers, {layers};"
            f" {self.bits:.3f} bits per weight of these layers, scales and zeros counted.",
            "Smaller on disk, not faster in transformers: it unpacks at the first forward and then computes as before, in the memory of"
            " the dense model. Engines with kernels for these bits keep them packed; measure speed there.",
        ]


def packed_report(folder: Path) -> PackedReport | None:
    """Of a folder; None if nothing in it is packed."""
    packed = packed_folder(folder)
    if packed is None:
        return None
    stored = {tensor.name: tensor for file in set(packed.where.values()) for tensor in check_file(file)}
    size = sum(tensor.bytes for name, tensor in stored.items() if packed.belongs(name) and not name.endswith("_shape"))
    weights = sum(math.prod(packed.shape(layer)) for layer in packed.schemes)
    return PackedReport(dict(Counter(scheme.bits for scheme in packed.schemes.values())), size, weights)
