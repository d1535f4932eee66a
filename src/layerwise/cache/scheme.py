"""How keys and values are grouped, what stays in full precision, and the bytes that follow: arithmetic alone.

| mode        | keys                                   | values                               | residual |
|-------------|----------------------------------------|--------------------------------------|----------|
| per-token   | the channels of one token of one head  | the same                             | 32       |
| kivi        | `group` tokens of one channel          | `group` channels of one token        | 32       |
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, ShapeError
from ..treatments import CacheMode
from .quantizers import BITS, STORED

Pair = tuple[int, int]  # bits of keys, bits of values
FULL: Pair = (16, 16)
_KIVI_GROUP = 32
_RESIDUAL = 32
_UNIT = 32  # tokens that mode per-token writes at a time
_PARAMETERS = 2 * STORED.itemsize  # bytes of the scale and the offset of a group


@dataclass(frozen=True)
class Grouping:
    """Of the keys, or of the values, of one layer (batch, heads, tokens, channels).

    axis, group: as of `quantize`. unit: tokens that are quantised together. keep: most recent tokens that stay as they are; fewer than
    `unit` others may wait with them.
    """

    axis: int
    group: int
    unit: int
    keep: int

    @property
    def at_once(self) -> bool:
        """Whether every token is written by itself as soon as it is there, so that later ones have no part in it."""
        return self.unit == 1 and self.keep == 0

    def quantized(self, tokens: int) -> int:
        """How many of so many tokens are held as codes."""
        return max(0, tokens - self.keep) // self.unit * self.unit

    def long_run(self, bits: int) -> float:
        """Bits of a number, with its share of scale and offset."""
        return bits if bits == 16 else bits + 8 * _PARAMETERS / self.group

    def nbytes(self, bits: int, tokens: int, heads: int, channels: int, exact: int) -> int:
        """Bytes of the codes, scales and offsets, and of the tokens that stay, of `exact` bytes a number."""
        coded = 0 if bits == 16 else self.quantized(tokens)
        numbers, waiting = heads * channels * coded, heads * channels * (tokens - coded)
        return numbers * bits // 8 + numbers // self.group * _PARAMETERS + waiting * exact


@dataclass(frozen=True)
class Scheme:
    """One for the whole cache. group, residual: None for the mode's own (see the table).

    residual: recent tokens that stay in full precision, since a unit of tokens is written at a time, which is what makes decoding fast.
    In mode "per-token" a unit is 32 tokens (all, where the residual is smaller): `residual` - unit to `residual` - 1 tokens stay; with 0
    every token is written in its own step. In mode "kivi" it is a group: of the keys `residual` - `group` to `residual` - 1 tokens stay,
    of the values `residual` to `residual` + `group` - 1. (KIVI writes values token by token; so a few more stay exact.)
    quantize_prefill: of the cache that has this scheme; mode "per-token" then has no residual of its own, so that every token is
    attended to as it is stored. Raises ConfigError.
    """

    mode: CacheMode = "per-token"
    group: int | None = None
    residual: int | None = None
    quantize_prefill: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("per-token", "kivi"):
            raise ConfigError(f'mode="{self.mode}": give "per-token" or "kivi".')
        if self.group is not None and self.group < 1:
            raise ConfigError(f"group={self.group}: give the numbers that share a scale, at least 1, or None.")
        if self.window < 0:
            raise ConfigError(f"residual={self.residual}: give the tokens that stay in full precision, at least 0.")
        if self.mode == "kivi" and self.window < self._size(0):
            raise ConfigError(
                f"residual={self.window} is less than group={self._size(0)}: in mode kivi the keys of a group wait in full"
                " precision until it is whole. Give at least the group."
            )

    @property
    def window(self) -> int:
        """The residual, the mode's own where none was given."""
        if self.residual is None:
            return 0 if self.mode == "per-token" and self.quantize_prefill else _RESIDUAL
        return self.residual

    def keys(self, channels: int) -> Grouping:
        """How keys of so many channels are grouped."""
        size = self._size(channels)
        if self.mode == "kivi":
            return Grouping(-2, size, size, self.window - size)
        unit = min(_UNIT, max(self.window, 1))
        return Grouping(-1, size, unit, max(self.window - unit, 0))

    def values(self, channels: int) -> Grouping:
        """How values of so many channels are grouped."""
        size = self._size(channels)
        return Grouping(-1, size, size, self.window) if self.mode == "kivi" else self.keys(channels)

    def check(self, pair: Pair, keys: int, values: int, where: str = "") -> None:
        """Raise ConfigError or ShapeError unless heads of so many channels can be held in these bits. where: begins the message."""
        check_pair(pair)
        sides = (("keys", pair[0], keys, self.keys(keys)), ("values", pair[1], values, self.values(values)))
        for what, bits, channels, grouping in sides:
            if bits == 16:
                continue
            if grouping.axis == -1 and channels % grouping.group:
                raise ShapeError(
                    f"{where}heads of {channels} channels do not split into groups of {grouping.group} ({what}, mode {self.mode})."
                    f" Give a group that divides {channels}."
                )
            if channels * bits % 8:
                raise ShapeError(
                    f"{where}heads of {channels} channels in {bits} bits do not fill whole bytes ({what}). Give more bits, or 16."
                )

    def _size(self, channels: int) -> int:
        if self.group is None:
            return _KIVI_GROUP if self.mode == "kivi" else channels
        return self.group


def check_pair(pair: Pair) -> None:
    """Raise ConfigError unless both are bits that a cache can have."""
    if not {*pair} <= {*BITS, 16} or len(pair) != 2:
        raise ConfigError(f"bits {pair}: give those of keys and of values, each 2, 4, 8, or 16 for full precision.")


def true_bits(pairs: Sequence[Pair], scheme: Scheme, keys: int, values: int | None = None) -> float:
    """Mean bits of a cached number over the layers once the context is long: scales and offsets counted, the residual not.

    keys, values: channels of a head (values None: as keys). Layers of one model have equally many numbers, so the mean is plain.
    """
    values = keys if values is None else values
    total = sum(
        keys * scheme.keys(keys).long_run(key_bits) + values * scheme.values(values).long_run(value_bits)
        for key_bits, value_bits in pairs
    )
    return total / (len(pairs) * (keys + values))


def cache_bytes(
    pairs: Sequence[Pair], scheme: Scheme, tokens: int, heads: int, keys: int, values: int | None = None, *,
    batch: int = 1, exact: int = 2,
) -> int:  # fmt: skip
    """Bytes of a cache that holds so many tokens of `batch` sequences, all parts counted.

    heads: key/value heads. keys, values: channels of a head. exact: bytes of a number in full precision, 2 for 16-bit models.
    """
    values = keys if values is None else values
    rows = batch * heads
    return sum(
        scheme.keys(keys).nbytes(key_bits, tokens, rows, keys, exact)
        + scheme.values(values).nbytes(value_bits, tokens, rows, values, exact)
        for key_bits, value_bits in pairs
    )


def parse_pair(text: str) -> Pair:
    """ "K8V4" -> (8, 4). Raises ConfigError."""
    match = re.fullmatch(r"K(\d+)V(\d+)", text.strip(), re.IGNORECASE)
    if not match or not {int(match[1]), int(match[2])} <= {*BITS, 16}:
        raise ConfigError(f'"{text}": write the bits of keys and values such as K8V4; each is 2, 4, 8 or 16.')
    return int(match[1]), int(match[2])


def pair_name(pair: Pair) -> str:
    """(8, 4) -> "K8V4"."""
    return f"K{pair[0]}V{pair[1]}"
