"""Treatments that change no single weight by itself: widths, caches, tokens, training."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from .treatment_base import Count, Fraction, Number, Record, kept_digits, one_or_more

CacheMode = Literal["per-token", "kivi"]


class Resize(Record):
    """Keep this many heads (key/value heads with their query heads) or channels. `kept` says which; without it those of the largest
    weights stay."""

    heads: Annotated[Count, Field(ge=0)] | None = Field(default=None, description="give the number kept, at least 0")
    kv_heads: Annotated[Count, Field(ge=0)] | None = Field(default=None, description="give the number kept, at least 0")
    channels: Annotated[Count, Field(ge=0)] | None = Field(default=None, description="give the number kept, at least 0")
    kept: str | None = Field(
        default=None,
        description="give the kept key/value heads or channels as x and hexadecimal digits, four a digit (1 = kept), or leave it out",
    )

    @field_validator("kept", mode="before")
    @classmethod
    def _digits(cls, kept: Any) -> Any:
        return kept_digits(kept)

    @model_validator(mode="after")
    def _something(self) -> "Resize":
        if self.heads is None and self.kv_heads is None and self.channels is None:
            raise ValueError("empty; give heads or kv_heads or channels")
        if self.channels is not None and (self.heads is not None or self.kv_heads is not None):
            raise ValueError("heads are of an attention, channels of an MLP: give one of them")
        if self.kept is not None and self.units is not None and int(self.kept[1:], 16).bit_count() != self.units:
            raise ValueError(
                f"kept names {int(self.kept[1:], 16).bit_count()} units, not {self.units}: change one of them"
            )
        return self

    @property
    def units(self) -> int | None:
        """Channels, or key/value heads; None where only query heads are given."""
        return self.channels if self.channels is not None else self.kv_heads

    def chosen(self, units: int) -> list[int] | None:
        """Which of so many units stay; None where `kept` does not say."""
        if self.kept is None:
            return None
        digits = format(int(self.kept[1:], 16), f"0{4 * len(self.kept) - 4}b")
        return [unit for unit, digit in enumerate(digits[:units]) if digit == "1"]


def _cached(bits: int) -> int:
    if bits not in (2, 4, 8, 16):
        raise ValueError("not 2, 4, 8 or 16")
    return bits


CachedBits = Annotated[Count, AfterValidator(_cached), Field(description="give 2, 4, 8, or 16 for full precision")]


class CacheBits(Record):
    """Bits of the keys and values that one attention caches, 16 being full precision, and how they are grouped (`cache.Scheme`)."""

    key_bits: CachedBits
    value_bits: CachedBits
    mode: CacheMode = Field(default="per-token", description="give per-token or kivi")
    group: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="give the numbers that share a scale, at least 1, or leave it out for the mode's own"
    )
    residual: Annotated[Count, Field(ge=0)] | None = Field(
        default=None, description="give the tokens that stay in full precision, or leave it out for the mode's own"
    )


class KeepTokens(Record):
    """Vision tokens that go on from this block, as a count or a fraction."""

    count: Annotated[Count, Field(ge=1)] | None = Field(default=None, description="give the number kept, at least 1")
    fraction: Fraction | None = Field(default=None, description="give the fraction kept, 0 <= fraction <= 1")

    @model_validator(mode="after")
    def _one(self) -> "KeepTokens":
        if (self.count is None) == (self.fraction is None):
            raise ValueError("give either count or fraction")
        return self


class Train(Record):
    """How much a layer or block is trained: what its learning rate is multiplied by; of a block, its probability in a draw of blocks
    (that of being the first that is drawn: those of a plan are scaled to sum 1)."""

    rate: Annotated[Number, Field(ge=0)] | None = Field(default=None, description="give a multiplier, at least 0")
    probability: Fraction | None = Field(default=None, description="give a probability, 0 <= probability <= 1")

    @model_validator(mode="after")
    def _something(self) -> "Train":
        return one_or_more(self)
