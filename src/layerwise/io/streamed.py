"""Save a streamed model: the same folder, records and promises as `save`, without the model ever being whole in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..plan import Plan
from .kv_cache import cache_words
from .places import loader_of
from .save import Saved, saved_report, write_records
from .stream import save_streamed
from .weights import weight_files
from .whole import check_output, whole_folder


def save_whole_streamed(
    model: nn.Module,
    folder: str | Path,
    *,
    dense: str | Path,
    plan: Plan | None = None,
    result: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Saved:
    """Write a model of `load_streamed` to `folder`, one shard per block, each read back and compared; whole or not at all.

    dense: the folder it came from. `verified` is None: no second process has the memory to load it. Raises OutputError before
    anything is written, SaveError on the way.
    """
    before = sum(file.stat().st_size for file in weight_files(Path(dense)))
    target = check_output(folder, force=force, needed=before + (32 << 20))
    with whole_folder(target, force=force) as partial:
        save_streamed(model, partial)
        saved = Saved(target, saved_report(partial, before=before), None, cache_words(plan))
        write_records(saved, partial, plan, result, model, loader_of(partial))
    return saved
