"""An energy model of a linear layer pruned in blocks: multiply-adds, on-chip (SRAM) and off-chip (DRAM) traffic. Coefficients are a table.

For one sample whose tokens (patches, positions) pass a layer `uses` times, a kept block of (height, width) costs

    mac  * uses * height * width                                          its multiply-adds
    sram * bytes * (height * width + uses * (width + 2 * height))         its weights read once; inputs read, partial sums read and written
    dram * (bytes * height * width + index_bytes)                         its weights and its place, read once

and whatever is pruned, inputs are read from DRAM and outputs written to it once: dram * bytes * uses * (columns + rows).
It is a model, no measurement: weights are read once a sample (batch 1), and activations of a layer fit on chip. The built-in tables are
the figures of M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, at 45 nm and 0.9 V: an addition and a
multiplication take 0.4 + 1.1 pJ in float16, 0.9 + 3.7 pJ in float32, 0.1 + 0.2 pJ in whole numbers (32-bit add, 8-bit multiply); 64
bits from a cache of 32 KiB 20 pJ, of 1 MiB 100 pJ, from DRAM 1.3 to 2.6 nJ (here: 32 KiB, 1.3 nJ).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..plan_text import mapping_of
from ..settings import nearest


@dataclass(frozen=True)
class EnergyTable:
    """Coefficients. Picojoules per multiply-add, per byte from SRAM, per byte from DRAM; bytes of a number, bytes of a block's place."""

    mac: float = 1.5
    sram: float = 2.5
    dram: float = 162.5
    bytes: float = 2.0
    index_bytes: float = 4.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < math.inf):
                raise ConfigError(f"energy table: {one.name}={value!r}: give a finite number, at least 0.")

    def of_block(self, height: int, width: int, uses: float) -> float:
        """Picojoules that a kept block takes for one sample."""
        area = height * width
        moved = self.bytes * (area + uses * (width + 2 * height))
        return self.mac * uses * area + self.sram * moved + self.dram * (self.bytes * area + self.index_bytes)

    def of_activations(self, rows: int, columns: int, uses: float) -> float:
        """Picojoules for a layer's inputs and outputs, whatever is pruned."""
        return self.dram * self.bytes * uses * (rows + columns)

    def block_bytes(self, height: int, width: int) -> float:
        """What a kept block takes in memory."""
        return self.bytes * height * width + self.index_bytes


TABLES: Mapping[str, EnergyTable] = {
    "float16": EnergyTable(),
    "float32": EnergyTable(mac=4.6, bytes=4.0),
    "int8": EnergyTable(mac=0.3, bytes=1.0),
}


def energy_table(name: str) -> EnergyTable:
    """A built-in table, or one of your own from a YAML or JSON file: a mapping of mac, sram, dram, bytes, index_bytes; what it leaves out
    is that of float16. Raises ConfigError, PlanError for a file that is no YAML or JSON."""
    if name in TABLES:
        return TABLES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(
            f'energy table "{name}": give {", ".join(TABLES)}, or a .yaml or .json file.{nearest(name, TABLES)}'
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'energy table "{name}": cannot be read as text: {getattr(error, "strerror", None) or "not UTF-8"}.'
        ) from error
    values: dict[str, Any] = mapping_of(text, str(path))
    if not values:
        raise ConfigError(f'energy table "{name}": no mapping in it, such as mac: 1.5.')
    known = {one.name for one in fields(EnergyTable)}
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(
            f'energy table "{name}": unknown entry "{unknown[0]}".{nearest(str(unknown[0]), known)} Entries: {", ".join(sorted(known))}.'
        )
    return EnergyTable(**values)
