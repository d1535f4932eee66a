"""The lowest of many tensors together, found without putting them together: what is held beside them does not grow with them.

Floats are seen as integers of the same order, 16 bits at a time: how many have which upper bits says between which two the limit lies,
and two such counts of float32, four of float64, give it exactly. All of it on the CPU, chunk by chunk.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 19  # numbers looked at together: they and their few copies are some 10 MB of float32
DIGIT = 16  # bits counted in one pass

Keys = Callable[[], Iterable[Tensor]]
"""The keys of one or more tensors in their order, chunk by chunk; every call begins anew."""


@dataclass(frozen=True)
class Cut:
    """Of a row of keys all above `limit` stay, and of those equal to it the first `ties`."""

    limit: int
    ties: int

    def stays(self, keys: Keys) -> Iterator[Tensor]:
        """Chunk by chunk: True where a key stays."""
        left = self.ties
        for chunk in keys():
            keep, equal = chunk > self.limit, chunk == self.limit
            count = int(equal.sum())
            if left:
                keep |= equal if count <= left else equal & (equal.cumsum(0) <= left)
            left = max(0, left - count)
            yield keep


def keep_lowest_out_of_all(
    scores: Sequence[Tensor], pruned: int, least: Sequence[int] | None = None, most: Sequence[int] | None = None
) -> list[Tensor]:
    """All but the `pruned` lowest of all tensors together; ties keep the tensor that comes first, in it the lower index.

    scores: floats but NaN, any shapes, dtypes and devices. least, most: so many of a tensor's own lowest count as below all others, and
    all but so many as above them (None: no bound). Returns bool masks in the shapes of the scores, on the CPU. Held beside both are a
    few chunks, and one score at a time where it is not contiguous.
    """
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32
    least = [0] * len(scores) if least is None else least
    most = [score.numel() for score in scores] if most is None else most
    each = [_bounded(*one, dtype) for one in zip(scores, least, most, strict=True)]

    def keys() -> Iterator[Tensor]:
        for of_one in each:
            yield from of_one()

    cut = _cut(keys, pruned, torch.finfo(dtype).bits)
    masks = [torch.empty(score.shape, dtype=torch.bool) for score in scores]
    parts = (part for mask in masks for part in torch.split(mask.view(-1), CHUNK))
    for part, keep in zip(parts, cut.stays(keys), strict=True):
        part.copy_(keep)
    return masks


def _keys(score: Tensor, dtype: torch.dtype) -> Keys:
    """The score's numbers as integers in the order of the floats of this dtype; zeros of both signs are one."""
    whole = torch.int64 if dtype == torch.float64 else torch.int32
    width = torch.iinfo(whole)

    def keys() -> Iterator[Tensor]:
        for chunk in torch.split(score.detach().flatten(), CHUNK):
            bits = (chunk.cpu().to(dtype) + 0.0).view(whole)  # -0.0 + 0.0 is 0.0
            yield bits ^ ((bits >> (width.bits - 1)) & width.max)  # of negative floats the larger bits are lower

    return keys


def _bounded(score: Tensor, least: int, most: int, dtype: torch.dtype) -> Keys:
    """Its keys, the `least` lowest of them at that of -inf and all but the `most` lowest at that of inf."""
    keys = _keys(score, dtype)
    if least == 0 and most == score.numel():
        return keys
    bits = torch.finfo(dtype).bits
    low, high = _cut(keys, least, bits), _cut(keys, most, bits)
    lowest, highest = torch.cat(list(_keys(torch.tensor([-math.inf, math.inf]), dtype)()))

    def bounded() -> Iterator[Tensor]:
        for chunk, may_stay, must_stay in zip(keys(), low.stays(keys), high.stays(keys), strict=True):
            yield torch.where(must_stay, highest, torch.where(may_stay, chunk, lowest))

    return bounded


def _cut(keys: Keys, pruned: int, bits: int) -> Cut:
    """Where the `pruned` lowest of keys of so many bits end; of equal ones the last are the lowest."""
    limit, going = -(1 << (bits - 1)), pruned  # below the key of -inf
    if not pruned:
        return Cut(limit, 0)
    ties, first = 0, limit >> (bits - DIGIT)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for chunk in keys():
            if shift < bits - DIGIT:
                chunk = chunk[chunk >> (shift + DIGIT) == limit]
            counts += torch.bincount((chunk >> shift) - first, minlength=1 << DIGIT)
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, going))
        ties = int(counts[digit])
        going -= int(upto[digit]) - ties
        limit = first + digit
        first = limit << DIGIT
    return Cut(limit, ties - going)
