"""The base of everything in a plan, and the numbers in it."""

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


def _number(value: Any) -> Any:
    """Numpy and torch scalars as plain ones. True is no number here (it would mean a sparsity of 1), nor is "0.5"."""
    if isinstance(value, (bool, str)):
        raise ValueError("not a number")
    return value.item() if hasattr(value, "item") else value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_number)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Bits = Annotated[Count, Field(ge=1, le=16, description="give whole bits, 1 to 16")]


class Record(BaseModel):
    """Base of everything in a plan: fixed once made, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_absent(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Absent fields are not written; a None that stands for something (one scale per row) is."""
        fields = type(self).model_fields
        return {
            name: value for name, value in plain(self).items() if value is not None or fields[name].default is not None
        }


R = TypeVar("R", bound=Record)


def one_or_more(record: R) -> R:
    """The record, if any of its fields is given. Raises ValueError."""
    if all(getattr(record, name) is None for name in type(record).model_fields):
        raise ValueError(f"empty; give {' or '.join(type(record).model_fields)}")
    return record


def kept_digits(kept: Any) -> Any:
    """Hexadecimal digits with the x, which no reader of YAML takes for a number; a plan may leave it out. Raises ValueError."""
    if kept is not None and not (isinstance(kept, str) and re.fullmatch(r"x?[0-9a-f]+", kept)):
        raise ValueError("not hexadecimal digits")
    return kept if kept is None else f"x{kept.removeprefix('x')}"
