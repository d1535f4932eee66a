"""Codes of 1 to 8 bits in 32-bit words, as compressed-tensors' `pack-quantized` has them.

A row is one stream of bits, little end first: code i takes the bits from i * bits on, and may lie in two words. So 32 codes fill exactly
`bits` words. compressed-tensors before 0.18 put floor(32 / bits) codes into each word instead: the same for 1, 2, 4 and 8 bits, another
layout for 3, 5, 6 and 7.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WORD = 32
AT_ONCE = 2**20  # codes widened to 32 bits at a time: what fits a cache is several times faster than the whole


def words_of(count: int, bits: int) -> int:
    """Words that `count` codes take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, count) unsigned codes below 2^bits, any integer type -> (rows, words) int32. The rest of the last word is zero."""
    rows, count = codes.shape
    packed = torch.empty(rows, words_of(count, bits), dtype=torch.int32, device=codes.device)
    for part in _parts(rows, count):
        padded = torch.nn.functional.pad(codes[part].to(torch.int32), (0, -count % WORD))
        wide = padded.reshape(padded.shape[0], -1, WORD)
        words = torch.zeros(*wide.shape[:2], bits, dtype=torch.int32, device=codes.device)
        for position, word, offset in _places(bits):
            words[..., word] |= wide[..., position] << offset  # what passes the top of the word falls off
            if offset + bits > WORD:
                words[..., word + 1] |= wide[..., position] >> (WORD - offset)
        packed[part] = words.flatten(1)[:, : packed.shape[1]]
    return packed


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(rows, words) int32 -> (rows, count) uint8: the inverse of `pack`."""
    rows = words.shape[0]
    codes = torch.empty(rows, count, dtype=torch.uint8, device=words.device)
    for part in _parts(rows, count):
        padded = torch.nn.functional.pad(words[part], (0, -words.shape[1] % bits))
        groups = padded.reshape(padded.shape[0], -1, bits)
        wide = torch.empty(*groups.shape[:2], WORD, dtype=torch.uint8, device=words.device)
        for position, word, offset in _places(bits):
            code = groups[..., word] >> offset
            if offset + bits > WORD:  # the shift filled the top with copies of the sign
                low = WORD - offset
                code = (code & ((1 << low) - 1)) | (groups[..., word + 1] << low)
            wide[..., position] = (code & ((1 << bits) - 1)).to(torch.uint8)
        codes[part] = wide.flatten(1)[:, :count]
    return codes


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """(position, word, first bit in it) of each of 32 codes."""
    for position in range(WORD):
        yield position, *divmod(position * bits, WORD)


def _parts(rows: int, count: int) -> Iterator[slice]:
    """Rows a few at a time."""
    step = max(1, AT_ONCE // max(1, count))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
