"""`QuantizedKVCache`: keys and values of every layer in their own bits, for `generate()` and for plain forward passes.

Departures from KVTuner's cache and from transformers' `QuantizedCache`: codes are packed into bytes, not one a byte; they are
appended to, never made anew, so what is stored does not drift; keys and values may differ in bits.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import ConfigError, ModelError, PlanError
from ..plan import Plan
from ..treatments import CacheMode
from .layer import QuantizedKVLayer, quantized_layer
from .models import check_pairs, decoder_config, left_full, quantizable, stock_layers
from .plans import pairs_of
from .scheme import Pair, Scheme, check_pair, pair_name


class QuantizedKVCache(Cache):  # type: ignore[misc]
    """Give it as `past_key_values`; one cache holds one conversation (or a batch of them), `fresh()` starts another.

    pairs: (bits of keys, bits of values), each 2, 4, 8 or 16 (full precision), one pair for each decoder layer. mode, group,
    residual: see `Scheme`. quantize_prefill: quantise what a forward pass brings before it is attended to, the prompt too; by default
    a pass attends to its own keys and values as they are, and to the past as it is stored. config: the model's; needed where layers
    are not all alike (sliding windows, linear attention: those stay as they are, and `notes` names them), and errors come earlier.

    Raises ConfigError (bits, the number of layers), ShapeError (groups or bytes that do not divide a head), ModelError (no KV cache
    of the usual kind).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        mode: CacheMode = "per-token",
        group: int | None = None,
        residual: int | None = None,
        quantize_prefill: bool = False,
        config: Any = None,
    ) -> None:
        self.pairs = tuple((int(keys), int(values)) for keys, values in pairs)
        self.scheme = Scheme(mode, group, residual, quantize_prefill)
        self.quantize_prefill, self.config = quantize_prefill, config
        if not self.pairs:
            raise ConfigError("pairs is empty: give (bits of keys, bits of values) for every decoder layer.")
        for pair in self.pairs:
            check_pair(pair)
        layers: list[Any] = [DynamicLayer() for _ in self.pairs]
        if config is not None:
            decoder = decoder_config(config)
            layers = stock_layers(decoder)
            check_pairs(self.pairs, layers, decoder, self.scheme)
        self.notes = left_full(self.pairs, layers)
        super().__init__(
            layers=[
                quantized_layer(layer, pair, self.scheme, quantize_prefill=quantize_prefill, index=index)
                if quantizable(layer)
                else layer
                for index, (pair, layer) in enumerate(zip(self.pairs, layers, strict=True))
            ]
        )

    @classmethod
    def uniform(cls, key_bits: int, value_bits: int, config: Any, **settings: Any) -> "QuantizedKVCache":
        """The same bits in every layer of the model with this config. settings: the class's own, by name."""
        return cls([(key_bits, value_bits)] * decoder_config(config).num_hidden_layers, config=config, **settings)

    @classmethod
    def from_plan(cls, plan: Plan, config: Any = None, *, quantize_prefill: bool = False) -> "QuantizedKVCache":
        """What the `cache` entries of a plan say; layers without one stay in full precision. config: as for the class; without it the last
        entry is of the model's last layer.

        Raises PlanError with every problem: no such entry, names that are no attention, schemes that differ, a layer whose cache
        cannot be quantised.
        """
        layers = None if config is None else decoder_config(config).num_hidden_layers
        pairs, scheme = pairs_of(plan, layers)
        made = cls(pairs, scheme.mode, scheme.group, scheme.residual, quantize_prefill, config)
        if made.notes:
            raise PlanError(
                [f"plan: it gives cache bits to layers that cannot have them: {note}" for note in made.notes]
            )
        return made

    def fresh(self) -> "QuantizedKVCache":
        """An empty cache of the same settings."""
        scheme = self.scheme
        return type(self)(self.pairs, scheme.mode, scheme.group, scheme.residual, self.quantize_prefill, self.config)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, tokens, channels) of one layer in; returns all to attend to. Raises ModelError if the model
        has more layers than the cache, or fills only some of them."""
        if layer_idx >= len(self.layers):
            raise ModelError(
                f"the model has a layer {layer_idx}, the cache is for {len(self.layers)} layers. Give a pair for each."
            )
        if self.config is None and layer_idx == 0 and self.layers[0].is_initialized and not self.is_initialized:
            filled = sum(layer.is_initialized for layer in self.layers)
            raise ModelError(
                f"the model has filled {filled} of the cache's {len(self.layers)} layers. Give a pair for each, or its config."
            )
        kept: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that are held, scales and offsets counted, by the tensors themselves."""
        return sum(_held(layer)[0] for layer in self.layers)

    @property
    def bits_per_element(self) -> float:
        """`nbytes` in bits over the numbers that are cached, full-precision ones among them; 0.0 for an empty cache."""
        elements = sum(_held(layer)[1] for layer in self.layers)
        return 8 * self.nbytes / elements if elements else 0.0

    def long_run(self) -> tuple[float, float]:
        """(bits of a number, bytes of a token of one sequence) that a long text comes to, over the layers that grow with it.

        Scales and offsets are counted, the residual is not; full precision counts as 16 bits, whatever the model's dtype. The cache must
        have been used: heads and channels are those it has seen. Raises ConfigError for an unused one.
        """
        sides = [side for layer in self.layers if isinstance(layer, QuantizedKVLayer) for side in layer.sides or ()]
        if not sides:
            raise ConfigError(
                "this cache has not been used yet, so its heads are not known: give it to a forward pass first."
            )
        bits = sum(side.width * side.grouping.long_run(side.bits) for side in sides)
        return bits / sum(side.width for side in sides), bits / 8

    @property
    def name(self) -> str:
        """ "K8V4" where all layers are alike, else the mean such as "K5.5V3.25"; with mode and group."""
        if len({*self.pairs}) == 1:
            bits = pair_name(self.pairs[0])
        else:
            keys, values = (sum(side) / len(self.pairs) for side in zip(*self.pairs, strict=True))
            bits = f"K{keys:g}V{values:g}"
        scheme = self.scheme
        more = [f"group {scheme.group}"] * (scheme.group is not None) + [f"residual {scheme.residual}"] * (
            scheme.residual is not None
        )
        return ", ".join([f"{bits} {scheme.mode}", *more])


def _held(layer: Any) -> tuple[int, int]:
    """(bytes, numbers) of keys and values in this layer."""
    if isinstance(layer, QuantizedKVLayer):
        return layer.nbytes, layer.elements
    kept = [part for part in (getattr(layer, "keys", None), getattr(layer, "values", None)) if part is not None]
    return sum(part.numel() * part.element_size() for part in kept), sum(part.numel() for part in kept)
