"""Bar charts as plain text, for terminals and logs."""

import math
from collections.abc import Mapping

from ..errors import ConfigError

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar_chart(
    values: Mapping[str, float],
    width: int,
    *,
    ascii_only: bool = False,
    form: str = ".3g",
    maximum: float | None = None,
) -> str:
    """One line per entry: label, bar, value; no line is longer than `width` characters.

    form: format of the values, such as ".1%". maximum: the value of a full bar (default: the largest here). A bar for a value above 0
    is never empty; a value that is not finite has none. On narrow terminals the bars go first, then the ends of the labels, then of
    the values. Raises ConfigError for a negative value or width below 1.
    """
    if width < 1 or any(value < 0 for value in values.values()):
        raise ConfigError("bar_chart: values must be 0 or more, and width at least 1.")
    if not values:
        return ""
    numbers = {label: format(value, form) for label, value in values.items()}
    number_width = max(map(len, numbers.values()))
    # a third of the line at most for the labels, unless the bars have ten characters without that
    label_width = min(
        max(map(len, values)), max(width // 3, width - number_width - 12), max(1, width - number_width - 1)
    )
    bar_width = width - label_width - number_width - 2
    if bar_width < 3:  # too short to compare: the labels need the room more
        bar_width, label_width = 0, max(1, min(max(map(len, values)), width - number_width - 1))
    finite = [value for value in values.values() if math.isfinite(value)]
    full = maximum if maximum is not None else max(finite, default=0.0)
    lines = []
    for label, value in values.items():
        parts = [_cut(label, label_width, ascii_only).ljust(label_width)]
        if bar_width:
            parts.append(_bar(value / full if full > 0 else 0.0, bar_width, ascii_only).ljust(bar_width))
        parts.append(numbers[label].rjust(number_width))
        lines.append(" ".join(parts)[:width].rstrip())
    return "\n".join(lines)


def _bar(share: float, width: int, ascii_only: bool) -> str:
    if not math.isfinite(share) or share <= 0:
        return ""
    share = min(share, 1.0)
    if ascii_only:
        return "#" * max(1, round(share * width))
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _cut(label: str, width: int, ascii_only: bool) -> str:
    """The end is kept: names of layers differ there."""
    if len(label) <= width:
        return label
    mark = "~" if ascii_only else "…"
    return mark + label[len(label) - width + 1 :] if width > 1 else mark
