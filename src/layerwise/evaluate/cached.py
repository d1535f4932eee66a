"""A language model that attends to keys and values as a quantised cache holds them, without generating anything."""

import torch
from torch import Tensor, nn

from ..cache import QuantizedKVCache
from ..errors import ConfigError, ModelError
from ..tasks.batches import Batch


def check_cache(cache: QuantizedKVCache, step: int | None) -> None:
    """Raise ConfigError unless tokens of a window would meet anything quantised."""
    if step is not None and step < 1:
        raise ConfigError(f"step={step}: give the tokens of a forward pass, at least 1, or None for whole windows.")
    if step is None and not cache.quantize_prefill:
        raise ConfigError(
            "this cache quantises after a forward pass, so a window in one pass meets nothing quantised."
            " Make it with quantize_prefill=True, or give step."
        )


def cached_logits(model: nn.Module, batch: Batch, cache: QuantizedKVCache, step: int | None = None) -> Tensor:
    """(batch, length, vocabulary) logits of windows that go through `cache`, an empty one, in passes of `step` tokens (None: one).

    In one pass every token attends to quantised keys and values, its own among them. Keys of mode "kivi" then share a scale with later
    tokens of their group, as they would once the group is whole. Raises ModelError for a model that does not take a cache.
    """
    device = next(parameter.device for parameter in model.parameters())
    ids = batch["input_ids"].to(device)
    more = {name: value.to(device) for name, value in batch.items() if name != "input_ids"} if step is None else {}
    found = []
    for part in torch.split(ids, step or ids.shape[1], dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True, **more)
        if getattr(output, "past_key_values", None) is not cache or not cache.get_seq_length():
            raise ModelError(f"{type(model).__name__} does not use the KV cache that it is given.")
        found.append(output.logits)
    return torch.cat(found, dim=1)
