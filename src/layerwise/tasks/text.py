"""Windows of tokens: `text` draws calibration samples, `held_out` cuts an evaluation text into windows in order.

How documents become one stream of tokens. A running text (a plain file) is tokenised once, with the special tokens its
tokenizer adds. Separate documents are tokenised one by one without special tokens, each followed by the EOS token; without an EOS
token, or with `join` given, their texts are joined (by a blank line, or by `join`) and tokenised once. WikiText-2 as the
papers use it is therefore the joined file, or its rows with `join` = two newlines.
`bos` puts the BOS token in front of every window (some models need it); the window keeps its length.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..randomness import generator_for
from .batches import Batches
from .sources import Documents, Facts, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rule = Literal["stream", "documents"]

_CHUNK = 64  # documents tokenised at once; each by itself, so the ids do not depend on it


def text(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    batch: int = 1,
    bos: bool = False,
    rule: Rule = "stream",
    join: str | None = None,
) -> Batches:
    """Calibration windows, `samples` x `length` tokens, in batches of `batch`: {"input_ids": (batch, length) int64}.

    rule "stream": windows at random starts that never overlap, every placement equally likely, in random order. Separate
    documents are shuffled first and joined until the stream holds twice the tokens needed (or all documents).
    rule "documents": the C4 rule of SparseGPT and Wanda, same draws as their `random.seed(seed)`: draw a document until one is
    longer than `length`, then a start in [0, tokens - length - 1]. Windows may overlap. Special tokens as the tokenizer adds.
    Raises DataError (one line) for data that cannot be used, ConfigError for settings out of range.
    """
    _check_sizes(length, bos, samples=samples, batch=batch)
    if rule == "documents" and join is not None:
        raise ConfigError('join applies to rule="stream": windows of rule="documents" never cross documents.')
    documents = read_documents(source, "calibration")
    take = length - bos
    if rule == "documents":
        windows = _document_windows(documents, tokenizer, samples, take, seed)
        facts: Facts = {"rule": rule}
    elif rule == "stream":
        stream, facts = _calibration_stream(documents, tokenizer, 2 * samples * take, seed, bos, join)
        windows = _stream_windows(stream, samples, take, seed, str(source))
        facts = {"rule": rule, **facts}
    else:
        raise ConfigError(f'rule={rule!r}: write "stream" or "documents".')
    facts = {**documents.facts, **facts, "samples": samples, "seed": seed}
    return _batches(list(windows), tokenizer, batch, bos, facts)


def held_out(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    tokens: int | None = None,
    batch: int = 1,
    bos: bool = False,
    tail: bool = False,
    join: str | None = None,
) -> Batches:
    """Evaluation windows: the text from its first token on, `length` tokens each, no gap, no overlap.

    tokens: use only the first so many of the text. tail: keep the last, shorter window too, as a batch of its own (only
    perplexity's convention "all" counts it). `python-docs` gives its held-out modules. Errors as in `text`.
    """
    _check_sizes(length, bos, batch=batch, tokens=length if tokens is None else tokens)
    documents = read_documents(source, "held-out")
    stream, facts = _stream(documents.texts, documents, tokenizer, bos, join)
    stream, take = stream[:tokens], length - bos
    if len(stream) < take:
        raise DataError(
            f"{source}: {len(stream)} tokens are less than one window of {take}. Use length <= {len(stream) + bos} or a longer text."
        )
    windows = list(torch.split(stream, take))
    if len(windows[-1]) < take and not (tail and len(windows[-1]) > 1 - bos):
        windows.pop()  # a last window of one token predicts nothing
    facts = {**documents.facts, "rule": "contiguous", **facts, "samples": len(windows)}
    return _batches(windows, tokenizer, batch, bos, facts, length)


def continued(data: Batches) -> Batches:
    """For an encoder-decoder: the first half of each window is what the encoder reads, the second what the decoder writes."""
    halves = []
    for batch in data:
        middle = batch["input_ids"].shape[1] // 2
        halves.append({"input_ids": batch["input_ids"][:, :middle], "labels": batch["input_ids"][:, middle:]})
    return Batches(tuple(halves), {**data.protocol, "form": "first half read, second half written"})


def check_vocabulary(batches: Batches, vocab_size: int) -> None:
    """Raises DataError if any token id is outside the model's embedding of `vocab_size` rows: the tokenizer is another model's."""
    low, high = 0, -1
    for one in batches:
        if (ids := one.get("input_ids")) is not None:
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
    if high >= vocab_size or low < 0:
        raise DataError(
            f"{batches.protocol.get('source', 'the data')}: token id {low if low < 0 else high} is outside the model's "
            f"vocabulary of {vocab_size}. Use the model's own tokenizer."
        )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """First 16 hex digits of sha256 over what decides the ids: the fast tokenizer's own description, or vocabulary and class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        described.pop("truncation", None)  # state of the last call, not of the tokenizer
        described.pop("padding", None)
    else:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _calibration_stream(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", enough: int, seed: int, bos: bool, join: str | None
) -> tuple[Tensor, Facts]:
    """Documents in random order until `enough` tokens: a small sample need not tokenise a whole library."""
    if documents.running:
        return _stream(documents.texts, documents, tokenizer, bos, join)
    order = torch.randperm(len(documents.texts), generator=generator_for(seed, "text/documents")).tolist()
    shuffled = [documents.texts[index] for index in order]
    return _stream(shuffled, documents, tokenizer, bos, join, enough)


def _stream(
    texts: Sequence[str],
    documents: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    bos: bool,
    join: str | None,
    enough: int | None = None,
) -> tuple[Tensor, Facts]:
    """All tokens in one row, and how they were joined. Documents joined by EOS stop after `enough` tokens."""
    eos = tokenizer.eos_token_id
    if documents.running or join is not None or eos is None:
        between = "\n\n" if join is None else join
        ids: list[int] = _ids(tokenizer, [between.join(texts)], special=not bos)[0]
        facts: Facts = {"join": "none" if documents.running else json.dumps(between)}
    else:
        ids, facts = [], {"join": f"EOS {eos}"}
        filled = [one for one in texts if one.strip()]
        for start in range(0, len(filled), _CHUNK):
            for one in _ids(tokenizer, filled[start : start + _CHUNK], special=False):
                ids += [*one, eos]
            if enough is not None and len(ids) >= enough:
                break
    return torch.tensor(ids, dtype=torch.int64), {**facts, "source_tokens": len(ids)}


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], special: bool) -> list[list[int]]:
    # verbose=False: a text longer than the model's context is what we want here, not something to warn about
    return list(
        tokenizer(list(texts), add_special_tokens=special, truncation=False, padding=False, verbose=False)["input_ids"]
    )


def _stream_windows(stream: Tensor, samples: int, length: int, seed: int, source: str) -> Iterator[Tensor]:
    """`samples` windows that do not overlap. Distinct sorted draws from tokens - samples * (length - 1) places, each moved on
    by the windows before it, give every placement the same chance."""
    if len(stream) < samples * length:
        most = len(stream) // length
        fewer = f"at most {most} samples of this length, or " if most else ""
        shorter = f"length <= {len(stream) // samples}" if len(stream) >= 2 * samples else "a longer text"
        raise DataError(
            f"{source}: {len(stream)} tokens cannot give {samples} samples of {length} ({samples * length} tokens). Use {fewer}{shorter}."
        )
    places = len(stream) - samples * (length - 1)
    drawn = torch.randperm(places, generator=generator_for(seed, "text/windows"))[:samples]
    ordered, order = drawn.sort()
    starts = torch.empty_like(ordered)
    starts[order] = ordered + torch.arange(samples) * (length - 1)
    for start in starts.tolist():
        yield stream[start : start + length]


def _document_windows(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", samples: int, length: int, seed: int
) -> Iterator[Tensor]:
    draw = random.Random(seed)  # noqa: S311  a private stream with the draws of the papers' code
    known: dict[int, list[int]] = {}
    longest = 0
    while samples:
        index = draw.randint(0, len(documents.texts) - 1)
        if index not in known:
            known[index] = _ids(tokenizer, [documents.texts[index]], special=True)[0]
            longest = max(longest, len(known[index]))
        if len(known[index]) > length:
            start = draw.randint(0, len(known[index]) - length - 1)
            yield torch.tensor(known[index][start : start + length], dtype=torch.int64)
            samples -= 1
        elif longest <= length and len(known) == len(documents.texts):
            raise DataError(
                f"{documents.facts['source']}: no document is longer than {length} tokens (the longest has {longest}). "
                f"Use length <= {longest - 1} or the rule stream."
            )


def _batches(
    windows: list[Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    batch: int,
    bos: bool,
    facts: Facts,
    length: int | None = None,
) -> Batches:
    """Windows of one length share batches; a shorter last one stands alone."""
    if bos:
        if tokenizer.bos_token_id is None:
            raise ConfigError("bos=True: this tokenizer has no BOS token. Leave bos off.")
        windows = [torch.cat([torch.tensor([tokenizer.bos_token_id]), window]) for window in windows]
    length = length or len(windows[0])
    whole = [window for window in windows if len(window) == length]
    groups = [torch.stack(whole[start : start + batch]) for start in range(0, len(whole), batch)]
    groups += [window[None] for window in windows[len(whole) :]]
    protocol: Facts = {
        **facts,
        "length": length,
        "tokens": sum(group.numel() for group in groups),
        "batch": batch,
        "bos": "every window"
        if bos
        else "none"
        if str(facts.get("join")).startswith("EOS")
        else "as the tokenizer adds",
        "tokenizer": tokenizer_hash(tokenizer),
        "first_ids": " ".join(str(int(one)) for one in groups[0][0][:10]),
    }
    return Batches(tuple({"input_ids": group} for group in groups), protocol)


def _check_sizes(length: int, bos: bool, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: give at least 1.")
    if length < 2 + bos:
        raise ConfigError(f"length={length}: give at least {2 + bos}; the first token of a window predicts nothing.")
