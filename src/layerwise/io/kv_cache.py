"""The KV cache of a saved folder: its bits are in the plan beside the weights, and no stock loader knows them."""

from pathlib import Path

from ..cache import QuantizedKVCache, has_cache
from ..errors import ModelError
from ..plan import Plan
from ..tasks.undisturbed import quiet
from .places import model_folder

PLAN = "plan.yaml"


def load_cache(name: str | Path, *, quantize_prefill: bool = False, remote_code: bool = False) -> QuantizedKVCache:
    """A new, empty cache with the bits of the plan that was saved with a model; give it as `past_key_values`.

    quantize_prefill: see `QuantizedKVCache`. Raises ModelError if the folder has no plan with cache entries, PlanError if they do not
    fit the model.
    """
    folder = model_folder(name, remote_code=remote_code)
    plan = cache_plan(folder)
    if plan is None:
        raise ModelError(
            f"{folder}: no {PLAN} with cache entries, so it has no KV cache of its own. Use the stock one."
        )
    return QuantizedKVCache.from_plan(plan, config_of(folder, remote_code), quantize_prefill=quantize_prefill)


def cache_plan(folder: Path) -> Plan | None:
    """The plan in this folder, if it gives bits to the KV cache. Raises PlanError if the plan cannot be read."""
    if not (folder / PLAN).is_file():
        return None
    plan = Plan.load(folder / PLAN)
    return plan if has_cache(plan) else None


def cache_words(plan: Plan | None) -> str | None:
    """One sentence for the report of a save, or None without cache entries."""
    if plan is None or not has_cache(plan):
        return None
    bits = [one.cache for one in plan.layers.values() if one.cache is not None]
    keys, values = (sum(getattr(one, f"{side}_bits") for one in bits) / len(bits) for side in ("key", "value"))
    return (
        f"KV cache of {len(bits)} layers, {keys:g} bits for keys and {values:g} for values in the mean: not in the weights; take"
        " layerwise.load_cache(folder) as past_key_values."
    )


def config_of(folder: Path, remote_code: bool = False) -> object:
    """The config of the folder's model. Raises ModelError."""
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # whatever the library's code raises on a config of others
        raise ModelError(f"{folder}: its config cannot be read: {str(error).splitlines()[0]}") from error
