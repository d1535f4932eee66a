"""What GGUF says of a tokenizer, from tokenizer.json: byte-level BPE whose splitting llama.cpp has a name for, and BPE with bytes to fall
back on (Llama 2).

llama.cpp splits text by its own code, chosen by a name; a wrong one gives other tokens without a word. So the rules of tokenizer.json
are matched as they stand, and what matches none is refused, unless the name is given.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
_LEAVE_OUT = "Leave the tokenizer out, and give token ids to llama.cpp"


@dataclass(frozen=True)
class TokenizerFacts:
    """model, pre: llama.cpp's names. tokens, types, scores: one for each row of the embedding; scores for `llama` alone."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    special: Any  # gguf's SpecialVocab: merges, ids of special tokens, the chat template

    def write(self, writer: Any) -> None:
        """Into the file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        self.special.add_to_gguf(writer, quiet=True)


def tokenizer_facts(gguf: Any, tokenizer: Any, pre: str | None, rows: int) -> TokenizerFacts:
    """Of a transformers tokenizer or a folder. rows: of the embedding; ids without a token are filled up.

    Raises ConfigError for what GGUF cannot say, and for more tokens than rows.
    """
    if isinstance(tokenizer, (str, Path)):
        return _facts(gguf, Path(tokenizer), pre, rows)
    with tempfile.TemporaryDirectory(prefix="layerwise-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return _facts(gguf, Path(folder), pre, rows)


def _facts(gguf: Any, folder: Path, pre: str | None, rows: int) -> TokenizerFacts:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{folder}: no tokenizer.json in it, which GGUF's tokenizer is made from. {_LEAVE_OUT}.")
    written = json.loads(file.read_text(encoding="utf-8"))
    model = written["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"tokenizer: {model.get('type')} is not written; BPE is. {_LEAVE_OUT}.")
    fallback = bool(model.get("byte_fallback"))
    name = pre or ("default" if fallback else _pre(written))
    tokens, types = _tokens(gguf, written, rows, fallback)
    ids = model["vocab"]
    scores = [-float(ids.get(token, index)) for index, token in enumerate(tokens)] if fallback else None
    special = gguf.SpecialVocab(folder, load_merges=not fallback, n_vocab=rows)
    return TokenizerFacts("llama" if fallback else "gpt2", name, tokens, types, scores, special)


def _tokens(gguf: Any, written: dict[str, Any], rows: int, fallback: bool) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [int(kinds.UNUSED)] * rows
    added = {one["content"]: one for one in written.get("added_tokens", [])}
    ids = {**written["model"]["vocab"], **{text: one["id"] for text, one in added.items()}}
    if (highest := max(ids.values())) >= rows:
        raise ConfigError(
            f"tokenizer: its token {highest} has no row among the {rows} of the model's embedding. Give the tokenizer of this model."
        )
    unknown = written["model"].get("unk_token")
    for text, index in ids.items():
        tokens[index] = text
        if text in added:
            kind = kinds.CONTROL if added[text].get("special") else kinds.USER_DEFINED
        elif fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        types[index] = int(kinds.UNKNOWN if fallback and text == unknown else kind)
    return tokens, types


def _pre(written: dict[str, Any]) -> str:
    """llama.cpp's name of how text is split before BPE."""
    first = written.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first]) if first.get("type") == "Sequence" else [first]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space") and _plain(written.get("normalizer")):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            found = _SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""))
            if found and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                return found
    raise ConfigError(
        f"tokenizer: how it splits text ({', '.join(map(str, kinds))}) is none of the ways that are known by name in llama.cpp (gpt-2,"
        f' smollm, llama-bpe, qwen2). Give the name: pre="...". {_LEAVE_OUT} otherwise.'
    )


def _plain(normalizer: dict[str, Any] | None) -> bool:
    """None, or Unicode's composed form, which llama.cpp's own converter passes over, too."""
    return normalizer is None or normalizer.get("type") == "NFC"
