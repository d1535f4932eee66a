"""Llama whose layers have widths of their own, as `per_layer_config` in config.json says them.

Needs torch and transformers alone: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). The model is transformers' own,
built from the sizes in config.json; then heads and channels of each layer are cut to their number. Written by layerwise.
"""

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

GLOBAL_READS = "allow_global_per_layer_attribute_access"


class LayerwiseLlamaModel(LlamaModel):
    """The decoder without a head."""

    layerwise_narrow = True

    def __init__(self, config: Any) -> None:
        plain, layers = taken_apart(config)
        super().__init__(plain)
        cut(self, layers)

    def save_pretrained(self, save_directory: Any, *more: Any, **options: Any) -> Any:
        """As transformers does, with the widths."""
        found = super().save_pretrained(save_directory, *more, **options)
        write_widths(self, self.config, Path(save_directory))
        return found


class LayerwiseLlamaForCausalLM(LlamaForCausalLM):
    """The language model."""

    layerwise_narrow = True

    def __init__(self, config: Any) -> None:
        plain, layers = taken_apart(config)
        super().__init__(plain)
        cut(self.model, layers)

    def save_pretrained(self, save_directory: Any, *more: Any, **options: Any) -> Any:
        """As transformers does, with the widths."""
        found = super().save_pretrained(save_directory, *more, **options)
        write_widths(self.model, self.config, Path(save_directory))
        return found


def taken_apart(config: Any) -> tuple[Any, dict[int, dict[str, int]]]:
    """The config of the sizes that most layers have, and what it says of each layer."""
    layers = {int(index): dict(one) for index, one in (config.to_dict().get("per_layer_config") or {}).items()}
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    plain.__dict__.pop(GLOBAL_READS, None)
    return plain, layers


def cut(decoder: Any, layers: dict[int, dict[str, int]]) -> None:
    """Make the linears of each layer as narrow as it says. Heads keep their size, key heads their number of query heads."""
    for index, said in layers.items():
        attention, mlp = decoder.layers[index].self_attn, decoder.layers[index].mlp
        if (width := said.get("intermediate_size")) is not None:
            for linear in (mlp.gate_proj, mlp.up_proj):
                narrow(linear, rows=width)
            narrow(mlp.down_proj, columns=width)
            mlp.intermediate_size = width
        if (heads := said.get("num_attention_heads")) is not None:
            narrow(attention.q_proj, rows=heads * attention.head_dim)
            narrow(attention.o_proj, columns=heads * attention.head_dim)
        if (heads := said.get("num_key_value_heads")) is not None:
            for linear in (attention.k_proj, attention.v_proj):
                narrow(linear, rows=heads * attention.head_dim)


def narrow(linear: nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    """The first of its outputs and inputs."""
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())


def write_widths(decoder: Any, config: Any, folder: Path) -> None:
    """Put the widths of the layers into the config.json that was written."""
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["per_layer_config"] = {}
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        sizes = {
            "intermediate_size": layer.mlp.down_proj.in_features,
            "num_attention_heads": attention.o_proj.in_features // attention.head_dim,
            "num_key_value_heads": attention.k_proj.out_features // attention.head_dim,
        }
        if own := {name: size for name, size in sizes.items() if size != getattr(config, name)}:
            written["per_layer_config"][str(index)] = own
    if any("num_attention_heads" in own for own in written["per_layer_config"].values()):
        written[GLOBAL_READS] = True
    file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
