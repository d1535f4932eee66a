"""Spectra of weight matrices: squared singular values, of the whole or pooled over windows of one shape.

The spectrum of noise depends on how long and narrow a matrix is, so those of a 512 x 100 and a 512 x 512 one do not compare; windows of
one ratio of columns to rows do (FARMS, ICML 2025). The official code takes the singular values of every window. Here they are eigenvalues
of Gram matrices on the windows' shorter side, and neighbours share those: windows in the same rows are blocks on the diagonal of one
Gram matrix, and the next rows change it by the few that enter and leave.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ScoreError, ShapeError

TINY = 1e-10  # eigenvalues below this share of the largest are zeros with rounding, and no part of a spectrum
BLURRED = 1e-5  # of a Gram matrix in float32, those below this share of the largest are mostly rounding
FEW = 0.01  # as long as no more than this share is blurred, the upper half of a spectrum is right to 1 %
AT_ONCE = 1 << 28  # bytes of Gram matrices that are taken apart in one call


@dataclass(frozen=True)
class Windows:
    """`count` windows along each side, of `rows` rows (fewer where the matrix is smaller) and `aspect` times as many columns.

    sample: 0 computes them all; k computes k of them along each side, each the middle one of a run of neighbours that it stands for.
    """

    rows: int = 2000
    aspect: float = 1.0
    count: int = 15
    sample: int = 0

    def shape(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Rows and columns of a window of such a matrix; None where none fits or would have a spectrum of nothing."""
        height = min(self.rows, rows, columns)
        width = int(height * self.aspect)
        return (height, width) if 0 < width <= columns else None

    def starts(self, length: int, window: int) -> list[int]:
        """First index of the windows computed along a side of this length: floor steps, as in the official code."""
        if self.count == 1:  # it divides by zero here
            return [(length - window) // 2]
        step = max(1, (length - window) // (self.count - 1))
        number = min(self.count, max(1, (length - window) // step + 1))
        every = [min(index * step, length - window) for index in range(number)]
        if not 0 < self.sample < number:
            return every
        return [every[(2 * index + 1) * number // (2 * self.sample)] for index in range(self.sample)]


def spectrum(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Squared singular values of (rows, columns), ascending, min(rows, columns) of them, in `dtype` on the matrix's device.

    Unit: that of the weights, squared; no centring, no division by the size. Those that rounding made negative are 0. float64
    resolves all down to TINY times the largest; float32 is three times as fast and blurs those below BLURRED. Raises ScoreError if a
    weight is not finite.
    """
    rows, columns = matrix.shape
    tall = _finite(matrix) if columns <= rows else _finite(matrix).T
    tall = tall.to(dtype)
    return _eigenvalues([tall.T @ tall])


def window_spectrum(matrix: Tensor, windows: Windows, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eigenvalues of all windows of (rows, columns), pooled and ascending: windows of equal size make that the mean spectrum.

    As `spectrum` otherwise. Raises ShapeError if no window fits into the matrix.
    """
    rows, columns = matrix.shape
    shape = windows.shape(rows, columns)
    if shape is None:
        raise ShapeError(
            f"window_spectrum: no window of {windows.rows} rows and {windows.aspect:g} times as many columns fits into"
            f" {rows} x {columns}. Take the whole matrix, or an aspect of 1."
        )
    down, across = windows.starts(rows, shape[0]), windows.starts(columns, shape[1])
    weight = _finite(matrix)
    # the Gram matrix is of the columns: those are to be the shorter side, of the window first, then of the matrix
    if (shape[1], columns) > (shape[0], rows):
        weight, down, across, shape = weight.T, across, down, (shape[1], shape[0])
    grams = _grams(weight.to(dtype), down, shape[0], across, shape[1])
    return _eigenvalues(batch for gram in grams for batch in _blocks(gram, across, shape[1]))


def slice_spectra(slices: Tensor, aspect: float | None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Spectra of a convolution from its (positions, outputs, inputs), one slice per kernel position and group; ascending, pooled over
    them. aspect None: one spectrum, of the whole slices. Else one for each window of that ratio of columns to rows: cut from the longer
    side one after the other, what is left over dropped; each is to be fitted by itself (FARMS averages their exponents).
    """
    tall = _finite(slices)
    if tall.shape[1] < tall.shape[2]:
        tall = tall.transpose(1, 2)
    _, rows, columns = tall.shape
    if aspect is None:
        return [_pooled(tall, dtype)]
    height, width = (columns, int(columns * aspect)) if aspect <= 1 else (int(columns / aspect), columns)
    if not height or not width:
        raise ShapeError(f"slice_spectra: no window of aspect {aspect:g} fits into {rows} x {columns}.")
    return [_pooled(tall[:, first : first + height, :width], dtype) for first in range(0, rows - height + 1, height)]


def blurred(eigenvalues: Tensor) -> bool:
    """Whether so many eigenvalues from float32 are mostly rounding that float64 is needed."""
    return bool((eigenvalues < BLURRED * eigenvalues.max()).double().mean() > FEW)


def _grams(weight: Tensor, down: Sequence[int], height: int, across: Sequence[int], width: int) -> Iterator[Tensor]:
    """For each start in `down`, the Gram matrix of the columns over those rows; or only the windows' own, where that is less work.

    Yields (columns, columns), or (windows, width, width). The one before is overwritten.
    """
    columns = weight.shape[1]
    if columns**2 > len(across) * width**2:
        for first in down:
            rows = weight[first : first + height]
            yield torch.stack([rows[:, left : left + width].T @ rows[:, left : left + width] for left in across])
        return
    gram, last = weight.new_zeros(columns, columns), 0
    for number, first in enumerate(down):
        if number == 0 or 2 * (first - last) >= height:
            rows = weight[first : first + height]
            torch.mm(rows.T, rows, out=gram)
        else:  # rows that entered, less those that left
            entered, left = weight[last + height : first + height], weight[last:first]
            gram.addmm_(entered.T, entered).addmm_(left.T, left, alpha=-1)
        last = first
        yield gram


def _blocks(gram: Tensor, across: Sequence[int], width: int) -> Iterator[Tensor]:
    """Batches of (some windows, width, width)."""
    batch = max(1, AT_ONCE // (width * width * gram.element_size()))
    if gram.ndim == 3:
        yield from torch.split(gram, batch)
        return
    for first in range(0, len(across), batch):
        some = across[first : first + batch]
        yield torch.stack([gram[left : left + width, left : left + width] for left in some])


def _pooled(slices: Tensor, dtype: torch.dtype) -> Tensor:
    short = slices if slices.shape[2] <= slices.shape[1] else slices.transpose(1, 2)
    short = short.to(dtype)
    return _eigenvalues([short.transpose(1, 2) @ short])


def _eigenvalues(grams: Iterable[Tensor]) -> Tensor:
    """Of all these symmetric matrices (..., n, n), pooled and ascending; what rounding made negative is 0."""
    parts: list[Tensor] = [torch.linalg.eigvalsh(gram).flatten() for gram in grams]
    return torch.cat(parts).clamp_(min=0).sort().values


def _finite(weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise ScoreError("spectrum: a weight is not finite. Take a sound checkpoint.")
    return weight
