"""A Llama of a few thousand weights with a tokenizer and a text of its own, saved in a folder: what the command line works on."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from models import small_llama

WORDS = 60
END, UNKNOWN = "<eos>", "<unk>"


def tiny_llama(
    folder: Path, *, blocks: int = 3, words: int = WORDS, vocabulary: int = WORDS + 4, seed: int = 0
) -> Path:
    """hidden 32, 2 heads, context 64. words: in the tokenizer; vocabulary: rows of the model's embedding."""
    model = small_llama(
        seed, vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=blocks,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=0, dtype=torch.float32,
    )  # fmt: skip
    model.save_pretrained(folder)
    table = {END: 0, UNKNOWN: 1} | {f"w{index}": index + 2 for index in range(words)}
    tokenizer = Tokenizer(WordLevel(table, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN).save_pretrained(folder)
    return folder


def tiny_text(path: Path, *, tokens: int = 6000, words: int = WORDS) -> Path:
    """Words that follow each other with some sense, so that calibration inputs differ."""
    draw = random.Random(0)  # noqa: S311
    last, out = 0, []
    for _ in range(tokens):
        last = (last * 7 + draw.choice([0, 1, 1, 2, 5])) % words
        out.append(f"w{last}")
    path.write_text(" ".join(out), encoding="utf-8")
    return path
