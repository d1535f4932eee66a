"""`quantization_config` of config.json: which layer has which scheme, in the words of compressed-tensors.

Written with the exact names of linears and a pattern for the experts of each block, one group for each scheme. Read with all that
compressed-tensors allows: exact names first, then regular expressions ("re:..."), then classes ("Linear").
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .pack_quantized import Scheme

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
GONE = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
LAYOUT = "0.20.0"  # the compressed-tensors whose layout we write: since 0.18 codes of 3, 5, 6 and 7 bits cross words


def config_of(targets: Mapping[str, Scheme], linears: Iterable[str], ignored: Iterable[str] = ()) -> dict[str, Any]:
    """The entry for these targets, names or patterns. linears: every linear of the model; those without a scheme are named in `ignore`.

    ignored: patterns that go there, too, but for one that takes a layer with a scheme: it would be left without its weight.
    """
    safe = (pattern for pattern in ignored if not any(re.match(pattern.removeprefix("re:"), name) for name in targets))
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in targets.items():
        groups.setdefault(scheme, []).append(name)
    return {
        "quant_method": METHOD,
        "version": LAYOUT,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": names,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for index, (scheme, names) in enumerate(groups.items())
        },
        "ignore": [*(name for name in linears if name not in targets), *safe],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that weights are in `pack-quantized`."""
    entry = config.get("quantization_config")
    if not isinstance(entry, Mapping) or entry.get("quant_method") != METHOD:
        return False
    groups = entry.get("config_groups")
    own = [group.get("format") or entry.get("format") for group in groups.values()] if isinstance(groups, dict) else []
    return bool(own) and all(one == FORMAT for one in own)


def refuse_gone(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError for the sparse formats that compressed-tensors once had and nothing reads any more."""
    entries = [config.get(name) for name in ("quantization_config", "compression_config")]
    for entry in (one for one in entries if isinstance(one, Mapping)):
        groups = entry.get("config_groups")
        parts = [entry, entry.get("sparsity_config"), *(groups.values() if isinstance(groups, Mapping) else ())]
        for part in parts:
            if isinstance(part, Mapping) and (name := part.get("format")) in GONE:
                raise ModelError(
                    f'{folder}/config.json: the weights are stored as "{name}", which compressed-tensors dropped in 2026; current'
                    " transformers and vLLM do not read it either. Expand it with compressed-tensors 0.14 or older and save it dense."
                )


def schemes_in(config: Mapping[str, Any], layers: Iterable[str], folder: Path) -> dict[str, Scheme]:
    """Layer -> scheme, of layers that have packed weights in the files. Raises ModelError for one that no group names, or a bad entry."""
    targets: dict[str, Scheme] = {}
    try:
        for group in config["quantization_config"]["config_groups"].values():
            scheme = _scheme(group["weights"])
            targets |= dict.fromkeys(group["targets"], scheme)
        patterns = {re.compile(target[3:]): scheme for target, scheme in targets.items() if target.startswith("re:")}
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise ModelError(f"{folder}/config.json: its quantization_config cannot be read ({error!r}).") from error
    found = {}
    for name in layers:
        matches = (scheme for pattern, scheme in patterns.items() if pattern.match(name))
        match = targets.get(name) or next(matches, None) or targets.get("Linear")
        if match is None:
            raise ModelError(f'{folder}/config.json: no group of its quantization_config is for the packed "{name}".')
        found[name] = match
    return found


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
    }


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if weights.get("type", "int") != "int" or strategy not in (None, "group", "channel"):
        raise ValueError(f"{weights.get('type')} weights by {strategy}: whole numbers by group or channel are read")
    size = None if strategy == "channel" or group is None or group < 0 else int(group)
    return Scheme(int(weights["num_bits"]), size, bool(weights.get("symmetric", True)))
