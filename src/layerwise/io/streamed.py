"""Save a streamed model: the same folder, records and promises as `save`, without the model ever being whole in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..engine import Result
from ..plan import Plan
from ..solvers.codes import Codes
from ..solvers.factors import Factors
from .card import plain
from .factored_write import factor_folder
from .kv_cache import cache_words
from .packed_write import choose, pack_folder
from .places import loader_of
from .save import BY_LAYERWISE, Saved, saved_report, write_records
from .stream import save_streamed
from .targets import Target, check_schemes
from .weights import weight_files
from .whole import check_output, whole_folder


def save_whole_streamed(
    model: nn.Module,
    folder: str | Path,
    *,
    dense: str | Path,
    plan: Plan | None = None,
    result: Mapping[str, Any] | Result | None = None,
    force: bool = False,
    codes: Mapping[str, Codes] | None = None,
    factors: Mapping[str, Factors] | None = None,
    target: Target = "transformers",
) -> Saved:
    """Write a model of `load_streamed` to `folder`, one shard per block, each read back and compared; whole or not at all.

    dense: the folder it came from. result, codes, factors, target: as of `save`. `verified` is None: no second process has the memory to
    load it. Raises OutputError and PlanError before anything is written, SaveError on the way.
    """
    result = plain(result)
    packing = choose(model, codes, target) if codes else None
    if packing is not None:
        check_schemes(packing.schemes, packing.linears, target)
    before = sum(file.stat().st_size for file in weight_files(Path(dense)))
    whole = check_output(folder, force=force, needed=before * (2 if packing or factors else 1) + (32 << 20))
    with whole_folder(whole, force=force) as partial:
        save_streamed(model, partial)
        if packing is not None:
            packing = pack_folder(partial, packing)
            check_schemes(packing.schemes, packing.linears, target)
        notes = packing.notes if packing else ()
        entry: dict[str, str] = {}
        loader = loader_of(partial)
        if factors:
            entry, notes = factor_folder(partial, factors)
            loader = BY_LAYERWISE
        saved = Saved(whole, saved_report(partial, before=before, notes=notes), None, cache_words(plan))
        write_records(saved, partial, plan, result, model, loader, entry)
    return saved
