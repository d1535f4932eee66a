"""Save a streamed model: the same folder, records and promises as `save`, without the model ever being whole in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..engine import Result
from ..errors import ModelError
from ..plan import Plan
from ..solvers.codes import Codes
from ..solvers.factors import Factors
from .card import as_stored, plain
from .factored_write import AllFactors, factor_folder
from .kv_cache import cache_words
from .packed_write import choose, pack_folder
from .places import loader_of
from .save import BY_LAYERWISE, Saved, write_records
from .saved_report import saved_report
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
    load it. Raises ModelError for codes and factors at once, OutputError and PlanError before anything is written, SaveError on the way.
    """
    plan, result = as_stored(plan, result), plain(result)
    every = AllFactors(model, factors)
    if every and codes:
        raise ModelError("a folder holds codes or factors, not both: save without one of them.")
    packing = choose(model, codes, target) if codes else None
    if packing is not None:
        check_schemes(packing.schemes, packing.linears, target)
    before = sum(file.stat().st_size for file in weight_files(Path(dense)))
    whole = check_output(folder, force=force, needed=before * (2 if packing or every else 1) + (32 << 20))
    with whole_folder(whole, force=force) as partial:
        save_streamed(model, partial)
        if packing is not None:
            packing = pack_folder(partial, packing)
            check_schemes(packing.schemes, packing.linears, target)
        notes = (*every.notes, *(packing.notes if packing else ()))
        entry: dict[str, str] = {}
        loader = loader_of(partial)
        if every:
            entry, more = factor_folder(partial, every)
            notes, loader = (*notes, *more), BY_LAYERWISE if entry else loader
        wider = packing.widened(codes) if packing and codes else {}
        report = saved_report(partial, before=before, notes=notes, widened=wider)
        saved = Saved(whole, report, None, cache_words(plan))
        write_records(saved, partial, plan, result, model, loader, every.entry(entry) if entry else None)
    return saved
