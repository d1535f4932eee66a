"""What a quantised cache costs: the divergence of the model's predictions, teacher-forced, from those with the full cache."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..scores import decoder_config
from ..tasks import Yardstick
from ..tasks.batches import Batch

Prefill = Literal["quantized", "exact"]
Metric = Callable[[nn.Module, Callable[[], Any], Sequence[Batch]], Tensor]
"""(model, a function that makes an empty cache, batches) -> (rows,), low = good: one number for each token, sample or question."""


class Cached(nn.Module):
    """The model with a new cache in every forward pass, so that it goes wherever a model goes.

    prefill: "quantized": one pass, in which every token attends to keys and values as they are stored. "exact": the first half of
    each sample is read as it is, and the second attends to it as it is stored; the result is that of the second half.
    """

    def __init__(self, model: nn.Module, new: Callable[[], Any], prefill: Prefill = "quantized") -> None:
        super().__init__()
        self.model, self.new, self.prefill = model, new, prefill

    def forward(self, use_cache: bool = False, **batch: Tensor) -> Any:
        """The model's own output. `use_cache` is what others say to models; here there always is one."""
        batch = {name: value for name, value in batch.items() if name != "labels"}
        cache = self.new()
        if self.prefill == "quantized":
            return self.model(**batch, past_key_values=cache, use_cache=True)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if batch.keys() - {"input_ids", "attention_mask"} or (mask is not None and not mask.all()) or ids.shape[1] < 2:
            raise DataError(
                'prefill="exact" cuts samples in two: give batches of two tokens or more, without padding or other inputs.'
            )
        middle = ids.shape[1] // 2
        self.model(input_ids=ids[:, :middle], past_key_values=cache, use_cache=True)
        return self.model(input_ids=ids[:, middle:], past_key_values=cache, use_cache=True)


class Divergence:
    """KL divergence in nats of every predicted token from the model with its full cache; the default metric.

    What the full cache predicts is kept for the batches that it was last asked about.
    """

    def __init__(self, prefill: Prefill = "quantized") -> None:
        self.prefill = prefill
        self._of: Sequence[Batch] | None = None
        self._yardstick: Yardstick | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module, new: Callable[[], Any], batches: Sequence[Batch]) -> Tensor:
        """(rows,), float64, >= 0."""
        if self._yardstick is None or self._of is not batches:
            full = model if self.prefill == "quantized" else Cached(model, lambda: _full(model), self.prefill)
            self._of, self._yardstick = batches, Yardstick(full, _unlabelled(batches))
        return self._yardstick.rows(Cached(model, new, self.prefill))


def _full(model: nn.Module) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=decoder_config(model))


def _unlabelled(batches: Sequence[Batch]) -> list[Batch]:
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
