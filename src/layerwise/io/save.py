"""Save a model as a stock folder, with the plan, the versions and the measured result beside it; checked before it appears.

Written under a name beside the target, loaded back in a fresh process, and only then renamed (`whole.py`, `verify.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..engine import Result
from ..errors import ConfigError, ModelError, SaveError
from ..passes import store_of
from ..plan import Plan
from ..shrink import is_narrow
from ..solvers.codes import Codes
from ..solvers.factors import Factors
from . import verify as checks
from .card import as_stored, card, plain, record
from .experts import BY_BLOCK, ONE_BY_ONE, unlike_in
from .factored_read import ENTRY, RECORD
from .factored_write import AllFactors, factor_folder, in_factors
from .kv_cache import PLAN, cache_words
from .packed_write import Packing, choose, need_compressed_tensors, pack_folder
from .places import Loader, read_config
from .remote_code import check_family, write_remote_code
from .saved_report import SavedReport, saved_report
from .stock_write import write_model, write_own_names
from .targets import Target, check_schemes
from .verify import Verified
from .weights import weight_files
from .whole import check_output, whole_folder

BY_LAYERWISE = Loader("layerwise", "load")
Mode = Literal["auto", "remote-code"]


@dataclass(frozen=True)
class Saved:
    """A folder that was written. `verified` is None if the check was left out, `cache` if the plan has no bits for the KV cache."""

    folder: Path
    report: SavedReport
    verified: Verified | None
    cache: str | None = None

    def lines(self) -> list[str]:
        """The report, and how it was checked."""
        checked = self.verified.words() if self.verified else "Not loaded back: the check was left out."
        return [*self.report.lines(), *([self.cache] if self.cache else []), checked]


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    plan: Plan | None = None,
    result: Mapping[str, Any] | Result | None = None,
    force: bool = False,
    verify: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
    dense: str | Path | None = None,
    codes: Mapping[str, Codes] | None = None,
    factors: Mapping[str, Factors] | None = None,
    target: Target = "transformers",
    mode: Mode = "auto",
) -> Saved:
    """Write `model` to `folder`: a stock transformers or diffusers folder, or plain weights for a module of another class.

    tokenizer, processor: saved beside the weights; a processor is what prepares images. result: measured figures, plain values, or
    the `Result` of `compress`. inputs: forward arguments for the check (default: small fixed ones). dense: the folder of the model
    before, to state its bytes. codes: layer -> codes of the weight that it has now; stored packed in their place
    (compressed-tensors pack-quantized), or dense with a note where the format or `target` cannot hold them. factors: layer ->
    factors of the weight that it has now, stored in its place; such a folder loads with `load` alone. So does that of a model with
    `ArmorLinear`s. mode: "remote-code" puts a modelling file beside widths of each layer, so that they load without layerwise
    (`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`), with `layerwise.load` as before.
    Raises ModelError for a streamed model (`save_whole_streamed`) or one with an adapter, ConfigError for a model that there is no
    modelling file for or that needs none, OutputError before anything is written (exists, no room, cannot be written), PlanError if
    `target` cannot run the codes' schemes, MissingExtra if they cannot be loaded back; SaveError if writing fails or the folder does not
    load back to the same model: then no folder appears.
    """
    if store_of(model) is not None:
        raise ModelError(
            "the model is streamed: save it by layerwise.io.save_whole_streamed(model, folder, dense=...)."
        )
    if getattr(model, "layerwise_adapter", None) is not None:
        raise ModelError(
            "the model has an adapter: merge it first (layerwise.recover.merge_adapter), or save that alone (save_adapter)."
        )
    if mode not in get_args(Mode):
        raise ConfigError(f'save: mode="{mode}": give {" or ".join(get_args(Mode))}.')
    if mode == "remote-code":
        check_family(model)
    plan, result = as_stored(plan, result), plain(result)
    every = AllFactors(model, factors)
    if every and codes:
        raise ModelError("a folder holds codes or factors, not both: save without one of them.")
    if every and mode == "remote-code":
        raise ConfigError('mode "remote-code": factors load with layerwise.load alone. Leave the mode out.')
    packing = choose(model, codes, target) if codes else None
    if packing is not None:
        check_schemes(packing.schemes, packing.linears, target)
        if verify and packing.codes:
            need_compressed_tensors()
    whole = check_output(folder, force=force, needed=needed_bytes(model) * (2 if packing or every else 1))
    before = sum(file.stat().st_size for file in weight_files(Path(dense))) if dense is not None else None
    with whole_folder(whole, force=force) as partial:
        loader = write_model(model, partial)
        if loader is not None and loader.library == "transformers" and is_narrow(read_config(partial)):
            loader = write_remote_code(model, partial) if mode == "remote-code" else BY_LAYERWISE
        entry: dict[str, str] = {}
        notes = every.notes
        if every:
            if every.absent(partial):
                write_own_names(model, partial)
            entry, more = factor_folder(partial, every)
            notes, loader = (*notes, *more), loader and (BY_LAYERWISE if entry else loader)
        if packing is not None:
            if packing.experts_by_block:
                notes, loader = (*notes, BY_BLOCK), loader and BY_LAYERWISE
            elif packing.codes and not packing.parts and unlike_in(model, partial):
                if target == "transformers":
                    write_own_names(model, partial)
                else:
                    notes, loader = (*notes, ONE_BY_ONE), loader and BY_LAYERWISE
            packing = pack_folder(partial, packing)
            check_schemes(packing.schemes, packing.linears, target)  # a layer less may part what is fused
            notes = (*notes, *packing.notes)
        for beside in (tokenizer, processor):
            if beside is not None:
                beside.save_pretrained(partial)
        report = saved_report(
            partial, before=before, notes=notes, widened=packing.widened(codes) if packing and codes else {}
        )
        saved = Saved(whole, report, None, cache_words(plan))
        facts = every.entry(entry) if entry else None
        # before the check, too: what is checked is what will be there
        write_records(saved, partial, plan, result, model, loader, facts)
        if verify:
            with in_factors(model, {name: every[name] for name in entry}):
                saved = replace(saved, verified=_verified(model, partial, whole, loader, inputs, packing))
            write_records(saved, partial, plan, result, model, loader, facts)
    return saved


def needed_bytes(model: nn.Module) -> int:
    """About what `save` will write: every tensor once (tied ones share their memory), and 32 MiB for the rest."""
    unique: dict[object, int] = {}
    for name, tensor in model.state_dict().items():
        unique[tensor.data_ptr() or name] = tensor.numel() * tensor.element_size()
    return sum(unique.values()) + (32 << 20)


def _verified(
    model: nn.Module,
    partial: Path,
    target: Path,
    loader: Loader | None,
    inputs: Mapping[str, Tensor] | None,
    packing: Packing | None,
) -> Verified:
    try:
        if loader is None:
            return checks.verify_tensors(model, partial)
        if (
            loader != BY_LAYERWISE
            and packing is not None
            and any(not scheme.symmetric for scheme in packing.schemes.values())
        ):
            return checks.verify_packed(model, partial, packing)
        return checks.verify(model, partial, loader, inputs=inputs, packing=packing)
    except SaveError as error:  # name the folder that the user asked for
        raise SaveError(str(error).replace(str(partial), str(target))) from error
    except ModelError as error:
        raise SaveError(f"{target}: what was written cannot be read back: {error}") from error


def write_records(
    saved: Saved,
    partial: Path,
    plan: Plan | None,
    result: Mapping[str, Any] | None,
    model: nn.Module,
    loader: Loader | None,
    factors: Mapping[str, object] | None = None,
) -> None:
    """layerwise.json, plan.yaml and the model card, beside the weights. factors: what it says of the layers in factors."""
    result = None if result is None else saved.report.as_stored(result)
    facts: dict[str, Any] = {
        "class": type(model).__name__,
        "loader": f"{loader.library}.{loader.class_name}" if loader else "layerwise.io.load_into",
        "saved": asdict(saved.report)
        | {
            name: part.to_dict()
            for name, part in (("packed", saved.report.packed), ("factored", saved.report.factored))
            if part is not None
        },
        "verified": asdict(saved.verified) if saved.verified else None,
    }
    if factors:
        facts[ENTRY] = factors
    if saved.cache:
        facts["cache"] = {"file": PLAN, "loader": "layerwise.io.load_cache"}
    if plan is not None:
        plan.save(partial / PLAN, force=True)
    text = json.dumps(record(plan, result, facts), indent=1, default=str)
    (partial / RECORD).write_text(text + "\n", encoding="utf-8")
    library = loader.library if loader and loader != BY_LAYERWISE else None
    page = card(saved.folder.name, plan, result, saved.lines(), library)
    (partial / "README.md").write_text(page, encoding="utf-8")
