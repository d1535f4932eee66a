"""Models and tokenizers in and out of folders, in stock formats; what is saved is checked in a fresh process."""

from .load import check_finite, load, load_into, load_tokenizer

__all__ = ["check_finite", "load", "load_into", "load_tokenizer"]
