"""Models with widths of each layer that load without layerwise: their modelling file goes with them, and is run by who allows it.

The file is `remote_model.py`, written for Llama, in the names of the family; `auto_map` in config.json points to it. Its class has a
name of its own, so that an engine with its own Llama does not take the folder for one.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..shrink import GLOBAL_READS, REMOTE_MODULE, said_by_layer
from .places import REMOTE_PREFIX, Loader

# model_type -> the family's name in its classes: decoders of q, k, v, o and gate, up, down whose attention asks for no number of heads
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "granite": "Granite",
}


def check_family(model: nn.Module) -> None:
    """Raise ConfigError for a model that no modelling file is written for, or that needs none."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    stock = type(model).__name__.removeprefix(REMOTE_PREFIX)
    if FAMILIES.get(str(kind)) is None or stock != f"{FAMILIES[str(kind)]}ForCausalLM":
        raise ConfigError(
            f'mode "remote-code": there is no modelling file for {stock}; there is one for the language models of'
            f" {', '.join(FAMILIES)}. Leave the mode out: the folder then loads with layerwise.load."
        )
    if "layerwise_narrow" not in vars(type(model)):
        raise ConfigError(
            f'mode "remote-code": all blocks of this {stock} are alike, so its stock class loads it. Leave the mode out.'
        )


def write_remote_code(model: nn.Module, folder: Path) -> Loader:
    """Write the modelling file beside the weights, and where it is into config.json. Returns what then loads the folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    layers = said_by_layer(model)
    assert layers  # noqa: S101  (`check_family` saw a narrow model of a family with one stack)
    config.pop("layerwise_widths", None)
    config["per_layer_config"] = layers
    if any(
        "num_attention_heads" in one for one in layers.values()
    ):  # Llama's config asks for it as if there were but one
        config[GLOBAL_READS] = True
    family = FAMILIES[config["model_type"]]
    (folder / f"{REMOTE_MODULE}.py").write_text(modelling_file(family), encoding="utf-8")
    whole, decoder = f"{REMOTE_PREFIX}{family}ForCausalLM", f"{REMOTE_PREFIX}{family}Model"
    config["architectures"] = [whole]
    config["auto_map"] = {
        "AutoModel": f"{REMOTE_MODULE}.{decoder}",
        "AutoModelForCausalLM": f"{REMOTE_MODULE}.{whole}",
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Loader("transformers", "AutoModelForCausalLM", remote_code=True)


def modelling_file(family: str) -> str:
    """The text of the file, in the names of this family."""
    return Path(__file__).with_name("remote_model.py").read_text(encoding="utf-8").replace("Llama", family)
