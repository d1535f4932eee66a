"""What a layer or block can get: plain records. A field's description says what would be right; messages quote it."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from .treatment_base import Bits, Count, Fraction, Number, Record, kept_digits
from .treatment_kinds import CacheBits, CacheMode, KeepTokens, Resize, Train

__all__ = [
    "FIELDS", "USUAL", "CacheBits", "CacheMode", "Count", "Factorize", "Fraction", "GroupBits", "KeepTokens", "Number", "Prune", "Quantize",
    "Record", "Resize", "Train", "Treatment", "Treatments", "bare", "kept_text",
]  # fmt: skip

_PATTERN = re.compile(r"unstructured|row|column|(?P<n>\d+):(?P<m>\d+)|block\((?P<rows>\d+)[x×](?P<columns>\d+)\)")
_BLOCK = re.compile(r"block:(\d+[x×]\d+)")  # the same without brackets, which shells ask to be quoted
_PATTERNS = 'write unstructured, row, column, n:m with 0 < n <= m such as "2:4", or a block such as "block(16x16)"'


class Prune(Record):
    """Set a fraction `sparsity` of the weights to zero. `n:m` keeps n of every m consecutive inputs of a row."""

    sparsity: Fraction = Field(description="give the fraction removed, 0 <= sparsity <= 1")
    pattern: str = Field(default="unstructured", description=_PATTERNS)
    kept: str | None = Field(
        default=None,
        description="give the kept blocks as x and hexadecimal digits, four blocks a digit, row by row (1 = kept), or leave it out",
    )

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        if brief := _BLOCK.fullmatch(pattern):
            pattern = f"block({brief[1]})"
        match = _PATTERN.fullmatch(pattern)
        if not match or (match["m"] and not 0 < int(match["n"]) <= int(match["m"])):
            raise ValueError("unknown pattern")
        if match["rows"] and not (int(match["rows"]) and int(match["columns"])):
            raise ValueError("empty block")
        return pattern

    @field_validator("kept", mode="before")
    @classmethod
    def _digits(cls, kept: Any) -> Any:
        return kept_digits(kept)

    @model_validator(mode="after")
    def _agrees(self) -> "Prune":
        if self.kept is not None and not self.block:
            raise ValueError(f"kept names blocks, and pattern {self.pattern} has none: leave one of them out")
        if (nm := self.nm) and abs(self.sparsity - (1 - nm[0] / nm[1])) > 1e-9:
            means = 1 - nm[0] / nm[1]
            raise ValueError(
                f"pattern {self.pattern} means sparsity {means:g}, not {self.sparsity:g}: change one of them"
            )
        return self

    @property
    def nm(self) -> tuple[int, int] | None:
        """(n kept, m) of an n:m pattern, else None."""
        match = _PATTERN.fullmatch(self.pattern)
        return (int(match["n"]), int(match["m"])) if match and match["m"] else None

    @property
    def block(self) -> tuple[int, int] | None:
        """(rows, columns) of a block pattern, else None."""
        match = _PATTERN.fullmatch(self.pattern)
        return (int(match["rows"]), int(match["columns"])) if match and match["rows"] else None

    def blocks_kept(self, blocks: int) -> list[bool] | None:
        """Which of so many blocks are kept, matrix after matrix, row by row; None where the solver chooses."""
        if self.kept is None:
            return None
        return [digit == "1" for digit in format(int(self.kept[1:], 16), f"0{4 * len(self.kept) - 4}b")[:blocks]]

    def unit(self, rows: int, columns: int) -> int:
        """How many weights of a (rows, columns) matrix go together: 1, a row, a column, a block."""
        if block := self.block:
            return block[0] * block[1]
        return {"row": columns, "column": rows}.get(self.pattern, 1)

    def zeros(self, size: int, rows: int, columns: int) -> int:
        """Exact number of zeros in a layer of `size` weights in matrices of (rows, columns): whole units, round half to even."""
        if nm := self.nm:
            return size // nm[1] * (nm[1] - nm[0])
        unit = self.unit(rows, columns)
        if self.kept is not None:
            return (size // unit - int(self.kept[1:], 16).bit_count()) * unit
        return round(self.sparsity * (size // unit)) * unit


class GroupBits(NamedTuple):
    """What is stored of each group of a quantised layer beside its codes; solvers differ in it (`Solver`).

    scale: bits of a scale. shift: a zero is any number and takes as many; else it is a code, of as many bits as a weight.
    """

    scale: int = 16
    shift: bool = False

    def of(self, bits: int, *, symmetric: bool) -> int:
        """Bits of scale and zero of one group of codes of `bits`; a symmetric grid stores no zero."""
        return self.scale + (0 if symmetric else self.scale if self.shift else bits)


USUAL = GroupBits()


class Quantize(Record):
    """`bits` per weight, one scale per `group` consecutive inputs (None: one per row)."""

    bits: Bits
    group: Annotated[Count, Field(ge=1)] | None = Field(
        default=128, description="give the inputs that share a scale, at least 1, or null for a whole row"
    )
    symmetric: bool = Field(default=False, strict=True, description="give true or false")

    def stored_bits(self, size: int, columns: int, *, nominal: bool = False, group_bits: GroupBits = USUAL) -> int:
        """Whole bits that `size` weights in rows of `columns` take: the codes and, for each group, scale and zero.

        nominal: the codes alone.
        """
        groups = 0 if nominal else size // columns * -(-columns // (self.group or columns)) if columns else 0
        return size * self.bits + groups * group_bits.of(self.bits, symmetric=self.symmetric)


class Factorize(Record):
    """Replace the weight by block-diagonal x sparse core x block-diagonal (ARMOR); `block` is the block's side."""

    block: Annotated[Count, Field(ge=1)] = Field(description="give the side of the diagonal blocks, at least 1")
    pattern: str = Field(
        default="2:4", description='write n:m with 0 < n <= m such as "2:4": n of every m entries of the core are kept'
    )

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        if ":" not in Prune._known(pattern):
            raise ValueError("no n:m pattern")
        return pattern

    @model_validator(mode="after")
    def _whole_groups(self) -> "Factorize":
        if self.block % self.nm[1]:
            m = self.nm[1]
            raise ValueError(f"a block of {self.block} does not split into groups of {m}; take a multiple of {m}")
        return self

    @property
    def nm(self) -> tuple[int, int]:
        """(n kept, m) of the core."""
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a (rows, columns) matrix cannot be split so, with what to do; None if it can."""
        if rows % self.block == 0 and columns % self.block == 0:
            return None
        shape = f"{rows} outputs x {columns} inputs"
        return f"{shape} do not split into diagonal blocks of {self.block}. Take one that divides both."

    def overhead(self, rows: int, columns: int) -> float:
        """Numbers in both factors over weights of a (rows, columns) matrix: b (rows + columns) / (rows columns)."""
        return self.block * (rows + columns) / (rows * columns)

    def stored_bits(self, size: int, rows: int, columns: int, *, nominal: bool = False) -> int:
        """Whole bits of `size` weights in (rows, columns) matrices, numbers taking 16: kept values, a bit for each position, factors.

        nominal: the core alone.
        """
        n, m = self.nm
        core = size // m * n * 16 + size // columns * (-(-columns // 8) * 8) if columns else 0
        return core if nominal or not size else core + size // (rows * columns) * 16 * self.block * (rows + columns)


Treatment = Prune | Quantize | Factorize | Resize | CacheBits | KeepTokens | Train
FIELDS: Mapping[str, type[Record]] = {
    "prune": Prune,
    "quantize": Quantize,
    "factorize": Factorize,
    "resize": Resize,
    "cache": CacheBits,
    "keep_tokens": KeepTokens,
    "train": Train,
}


class Treatments(Record):
    """All that one layer or block gets. `drop` removes a whole block."""

    prune: Prune | None = None
    quantize: Quantize | None = None
    factorize: Factorize | None = None
    resize: Resize | None = None
    cache: CacheBits | None = None
    keep_tokens: KeepTokens | None = None
    train: Train | None = None
    drop: Literal[True] | None = Field(default=None, description="write true, or leave it out")

    @model_validator(mode="after")
    def _go_together(self) -> "Treatments":
        chosen = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if not chosen:
            raise ValueError("no treatment given; leave the layer out to leave it alone")
        if self.drop and len(chosen) > 1:
            raise ValueError(f"drop goes with nothing else, not with {' and '.join(n for n in chosen if n != 'drop')}")
        if self.factorize and (self.prune or self.quantize):
            raise ValueError("factorize goes with neither prune nor quantize: keep one of them")
        return self

    def problems(self, rows: int, columns: int, size: int | None = None) -> list[str]:
        """Patterns and groups that do not divide matrices of (rows, columns), and kept blocks that are not those of `size` weights (None:
        of one matrix); a sentence each with what to do."""
        shape, found = f"{rows} outputs x {columns} inputs", []
        if self.prune and (nm := self.prune.nm) and columns % nm[1]:
            found.append(
                f"{shape} do not split into groups of {nm[1]} inputs for {self.prune.pattern}. Leave it out or use unstructured."
            )
        if self.prune and (block := self.prune.block) and (rows % block[0] or columns % block[1]):
            found.append(
                f"{shape} do not split into {self.prune.pattern}. Take a block that divides both, or unstructured."
            )
        elif self.prune and self.prune.kept is not None:
            found += _wrong_blocks(self.prune, (size or rows * columns) // self.prune.unit(rows, columns))
        if self.quantize and (group := self.quantize.group) and columns % group:
            found.append(
                f"{shape} do not split into quantization groups of {group}. Take a group that divides the inputs, or null."
            )
        if self.factorize and (problem := self.factorize.problem(rows, columns)):
            found.append(problem)
        return found


def bare(treatment: object) -> object:
    """A treatment by itself as the mapping that `Treatments` reads; anything else as it is."""
    field = next((name for name, kind in FIELDS.items() if type(treatment) is kind), None)
    return {field: treatment} if field else treatment


def kept_text(keep: Iterable[bool]) -> str:
    """What `Prune.kept` says of these blocks; the last digit is filled up with zeros."""
    digits = "".join("1" if one else "0" for one in keep)
    width = -(-len(digits) // 4)
    return "x" + format(int(digits.ljust(4 * width, "0") or "0", 2), f"0{width}x")


def _wrong_blocks(prune: Prune, blocks: int) -> list[str]:
    kept = (prune.kept or "")[1:]
    if len(kept) != -(-blocks // 4) or int(kept, 16) % (1 << (4 * len(kept) - blocks)):
        return [f"kept has {len(kept)} digits; {blocks} blocks take {-(-blocks // 4)}, the last filled up with zeros."]
    gone = blocks - int(kept, 16).bit_count()
    if round(prune.sparsity * blocks) != gone:
        return [
            f"kept leaves out {gone} of {blocks} blocks, which is a sparsity of {gone / blocks!r}. Change one of them."
        ]
    return []
