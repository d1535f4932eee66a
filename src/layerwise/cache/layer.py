"""One layer of the cache, as transformers asks for it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from .scheme import Pair, Scheme, pair_name
from .side import Side


class QuantizedKVLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention in their own bits. `keys` and `values` are the recent tokens, in the model's dtype."""

    def __init__(self, pair: Pair, scheme: Scheme, *, quantize_prefill: bool, index: int) -> None:
        super().__init__()
        self.pair, self.scheme, self.quantize_prefill, self.index = pair, scheme, quantize_prefill, index
        self.record_past = False
        self.sides: tuple[Side, Side] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({pair_name(self.pair)})"

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(part.numel() * part.element_size() for side in self.sides or () for part in side.tensors())

    @property
    def elements(self) -> int:
        """Numbers that are cached, keys and values."""
        return sum(side.elements for side in self.sides or ())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take sizes, dtype and device from the first states, (batch, heads, tokens, channels). Raises ShapeError (groups)."""
        keys, values = key_states.shape[-1], value_states.shape[-1]
        self.scheme.check(self.pair, keys, values, f"layer {self.index}: ")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.sides = (
            Side(self.pair[0], self.scheme.keys(keys), key_states, f"keys of layer {self.index}"),
            Side(self.pair[1], self.scheme.values(values), value_states, f"values of layer {self.index}"),
        )
        self.is_initialized = True
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values (batch, heads, tokens, channels) in; returns all of them, to attend to."""
        if self.sides is None:
            self.lazy_initialization(key_states, value_states)
        assert self.sides is not None  # noqa: S101  (for the type checker)
        keys, values = (
            side.add(new, first=self.quantize_prefill, hold=self.record_past)
            for side, new in zip(self.sides, (key_states, value_states), strict=True)
        )
        self._show()
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.sides is None else self.sides[0].tokens

    def activate_past_recording(self) -> None:
        """From now on what a forward pass adds is quantised at the next pass or `crop`, so that it can be taken back as it came."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -`tokens_to_remove` tokens (0 or less, as the base class asks); see `Side.crop` for what a cut group becomes."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # it refuses
        if self.sides is None:
            return
        for side in self.sides:
            side.crop(min(-tokens_to_remove, side.tokens))
            side.settle()
        self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for side in self.sides or ():
            side.select(indices)
        self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        for side in self.sides or ():
            side.select(torch.arange(side.recent.shape[0]).repeat_interleave(repeats))
        self._show()

    def reset(self) -> None:
        self.sides = None
        super().reset()

    def _show(self) -> None:
        if self.sides is not None:
            self.keys, self.values = (side.recent for side in self.sides)


class QuantizedHybridLayer(LinearAttentionLayer, QuantizedKVLayer):  # type: ignore[misc]
    """The same beside a state of fixed size, which stays as it is (Falcon-H1); of two parts, as transformers' own."""

    is_compileable = False

    def __init__(self, pair: Pair, scheme: Scheme, *, quantize_prefill: bool, index: int, states: int) -> None:
        QuantizedKVLayer.__init__(self, pair, scheme, quantize_prefill=quantize_prefill, index=index)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def __repr__(self) -> str:
        return QuantizedKVLayer.__repr__(self)

    def lazy_initialization(self, *states: Tensor, **state: Any) -> None:
        """Keys and values come by position, the states of linear attention by name."""
        if states:
            QuantizedKVLayer.lazy_initialization(self, *states)
        else:
            LinearAttentionLayer.lazy_initialization(self, **state)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        QuantizedKVLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        QuantizedKVLayer.reorder_cache(self, beam_idx)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        QuantizedKVLayer.reset(self)


def quantized_layer(stock: Any, pair: Pair, scheme: Scheme, *, quantize_prefill: bool, index: int) -> QuantizedKVLayer:
    """The layer that takes the place of transformers' own."""
    if isinstance(stock, LinearAttentionLayer):
        states = stock.number_of_states
        return QuantizedHybridLayer(pair, scheme, quantize_prefill=quantize_prefill, index=index, states=states)
    return QuantizedKVLayer(pair, scheme, quantize_prefill=quantize_prefill, index=index)
