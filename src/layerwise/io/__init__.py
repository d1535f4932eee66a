"""Models and tokenizers in and out of folders, in stock formats; what is saved is checked in a fresh process."""

from .armor_linear import ArmorLinear, armor_linears, fastest_cores, multiplied_out
from .cropped import export_onnx, load_cropped, save_cropped
from .experts import check_experts, left_dense
from .gguf_deci import SavedGGUF, save_gguf
from .kv_cache import load_cache
from .load import check_finite, load, load_image_processor, load_into, load_tokenizer
from .packed_read import packed_codes
from .packed_write import linears_of, need_compressed_tensors
from .places import model_folder
from .save import Saved, needed_bytes, save
from .saved_report import SavedReport, saved_report
from .stream import load_streamed
from .streamed import save_whole_streamed
from .targets import Target, check_plan, planned_schemes, target_of
from .verify import Verified
from .whole import check_output
from .zeros import count_zeros

__all__ = [
    "ArmorLinear",
    "Saved",
    "SavedGGUF",
    "SavedReport",
    "Target",
    "Verified",
    "armor_linears",
    "check_experts",
    "check_finite",
    "check_output",
    "check_plan",
    "count_zeros",
    "export_onnx",
    "fastest_cores",
    "left_dense",
    "linears_of",
    "load",
    "load_cache",
    "load_cropped",
    "load_image_processor",
    "load_into",
    "load_streamed",
    "load_tokenizer",
    "model_folder",
    "multiplied_out",
    "need_compressed_tensors",
    "needed_bytes",
    "packed_codes",
    "planned_schemes",
    "save",
    "save_cropped",
    "save_gguf",
    "save_whole_streamed",
    "saved_report",
    "target_of",
]
