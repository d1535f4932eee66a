"""Masked LoRA: a low-rank update where the weight is kept, W + s (B A) * mask, so that a merge fills no zero (LoSA, Huang et al. 2025).

The mask is a buffer of its own, taken once: a kept weight may merge to exactly 0 and be told from a pruned one afterwards. PEFT has no such
adapter, and would load its files as plain LoRA, whose outputs differ: they are marked with a type that PEFT refuses (`adapters.py`).
"""

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn.functional import linear


class MaskedLoraLinear(Linear):  # type: ignore[misc]  # peft is not typed
    """A linear with one adapter. `keep`: bool (outputs, inputs), what is not zero in the weight it is made on, until it is replaced."""

    keep: Tensor

    def __init__(self, base_layer: Any, adapter_name: str, *more: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, *more, **options)
        self.register_buffer("keep", base_layer.weight.detach() != 0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a merge adds, zero where pruned. (outputs, inputs)"""
        low, high = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        delta: Tensor = self.scaling[adapter] * (high @ low) * self.keep
        return delta

    def forward(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        """The update is formed whole, as the mask asks: a product of its two factors with x would ignore it."""
        result: Tensor = self.base_layer(x, *more, **options)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            delta = self.get_delta_weight(adapter)
            shown = self.lora_dropout[adapter](x.to(delta.dtype))
            result = result + linear(shown, delta).to(result.dtype)
        return result
