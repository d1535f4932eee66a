"""Models and tokenizers in and out of folders, in stock formats; what is saved is checked in a fresh process."""

from .kv_cache import load_cache
from .load import check_finite, load, load_image_processor, load_into, load_tokenizer
from .places import model_folder
from .save import Saved, SavedReport, needed_bytes, save, saved_report
from .stream import load_streamed
from .streamed import save_whole_streamed
from .verify import Verified
from .whole import check_output
from .zeros import count_zeros

__all__ = [
    "Saved",
    "SavedReport",
    "Verified",
    "check_finite",
    "check_output",
    "count_zeros",
    "load",
    "load_cache",
    "load_image_processor",
    "load_into",
    "load_streamed",
    "load_tokenizer",
    "model_folder",
    "needed_bytes",
    "save",
    "save_whole_streamed",
    "saved_report",
]
