"""The attentions of a model whose cache can be quantised, what they store, and the choices that KVTuner has for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Literal, cast

from torch import Tensor, nn

from ..allocate import additive_front, clusters, mean_bits, pareto_front
from ..allocate.cluster import Noise
from ..errors import ModelError
from ..plan import CacheBits
from ..scores import all_pairs, attention_errors, decoder_config
from ..tasks.batches import Batch, call
from .kv_loss import Cached
from .kv_space import Pair, Pairs, Space

if TYPE_CHECKING:
    from ..cache import Scheme

_STARTS = 12  # sums of errors that the first generation holds
Errors = Mapping[str, Mapping[Pair, float]]
"""Attention -> pair -> relative error of its output."""


@dataclass(frozen=True)
class Layers:
    """names: of the attentions, in order. places: their decoder layers, of `total`. sizes: numbers of a token's key and value. heads: key
    and value channels of a head. nominal: scales and offsets do not count."""

    names: tuple[str, ...]
    places: tuple[int, ...]
    total: int
    sizes: tuple[Pair, ...]
    heads: tuple[Pair, ...]
    scheme: "Scheme"
    nominal: bool

    @property
    def groups(self) -> list[Pair]:
        """Numbers that share a scale, of keys and of values."""
        return [(self.scheme.keys(keys).group, self.scheme.values(values).group) for keys, values in self.heads]

    def bits(self, pairs: Pairs, nominal: bool | None = None) -> Fraction:
        """Mean bits of a cached number once the text is long: what recent tokens take in full precision is not counted."""
        plain = self.nominal if nominal is None else nominal
        return mean_bits(pairs, self.sizes, None if plain else self.groups)

    def cost(self, index: int, pair: Pair) -> Fraction:
        """Bits that a token leaves in one attention."""
        groups = None if self.nominal else [self.groups[index]]
        return mean_bits([pair], [self.sizes[index]], groups) * sum(self.sizes[index])

    def spread(self, pairs: Pairs) -> Pairs:
        """One pair for each decoder layer; those that are not ours stay in full precision."""
        every: list[Pair] = [(16, 16)] * self.total
        for place, pair in zip(self.places, pairs, strict=True):
            every[place] = pair
        return tuple(every)

    def pairs(self, choices: Sequence[int]) -> list[Pair]:
        """Every pair of these bits, most bits first."""
        return all_pairs(choices)

    def quantise(self, x: Tensor, bits: int, which: Literal["key", "value"]) -> Tensor:
        """Through the cache's grid and back. Tokens that make no whole group stay: they would wait in full precision."""
        from ..cache import quantize

        if bits == 16:
            return x
        grouping = (self.scheme.keys if which == "key" else self.scheme.values)(x.shape[-1])
        whole = x.shape[-2] // grouping.unit * grouping.unit
        made = x.float().clone()
        if whole:
            part = quantize(x[..., :whole, :], bits, axis=grouping.axis, group=grouping.group)
            made[..., :whole, :] = part.values()
        return made

    def notes(self, space: Space, choices: Sequence[int]) -> tuple[str, ...]:
        """What a reader of the plan should know."""
        window = replace(self.scheme, quantize_prefill=False).window  # in use
        found = [
            f"{len(self.names)} attentions in {len(space.members)} groups, {space.size:.3g} choices of"
            f" {len(choices) ** 2}^{len(self.names)}; bits do not count the tokens that stay in full precision ({window})."
        ]
        if len(self.names) < self.total:
            found.append(
                f"{self.total - len(self.names)} of {self.total} decoder layers keep no cache that grows: they stay as they are."
            )
        return tuple(found)


def layers_of(model: nn.Module, batch: Batch, treatment: CacheBits, nominal: bool) -> Layers:
    """Seen in one forward pass of one sample with transformers' own cache. Raises ModelError, ShapeError (groups that divide no head)."""
    from transformers.cache_utils import DynamicCache

    from ..cache import Scheme
    from ..cache import models as known

    config, scheme = (
        decoder_config(model),
        Scheme(treatment.mode, treatment.group, treatment.residual, quantize_prefill=True),
    )
    known.stock_layers(known.decoder_config(model.config))  # its errors
    cache = DynamicCache(config=config)
    call(Cached(model, lambda: cache), {name: value[:1] for name, value in batch.items()})
    plain = [i for i, layer in enumerate(cache.layers) if known.quantizable(layer) and layer.is_initialized]
    by_place = {
        module.layer_idx: name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", "Attention" in type(module).__name__)
    }
    if not plain:
        raise ModelError(f"{type(model).__name__} does not use the key-value cache that it is given.")
    if shared := [place for place in plain if place not in by_place]:
        raise ModelError(
            f"{type(model).__name__}: layers {known.few(shared)} have no attention of their own (they share one, or it has no number),"
            " so bits cannot be named for each. Choose the bits of its QuantizedKVCache yourself."
        )
    shapes = [(cache.layers[place].keys.shape, cache.layers[place].values.shape) for place in plain]
    for keys, values in shapes:
        scheme.check((2, 2), keys[-1], values[-1])
    return Layers(
        names=tuple(by_place[place] for place in plain),
        places=tuple(plain),
        total=len(cache.layers),
        sizes=tuple((keys[1] * keys[3], values[1] * values[3]) for keys, values in shapes),
        heads=tuple((keys[3], values[3]) for keys, values in shapes),
        scheme=scheme,
        nominal=nominal,
    )


def measured_errors(model: nn.Module, data: Sequence[Batch], layers: Layers, choices: Sequence[int]) -> Errors:
    """The error of each attention's output for each pair."""
    found = attention_errors(model, data, layers.quantise, choices)
    return {name: {pair: found[name][pair].output for pair in layers.pairs(choices)} for name in layers.names}


def space_of(errors: Errors, layers: Layers, eps: float, members: int, noise: str) -> Space:
    """The pairs worth having of every attention, and which attentions decide together. A group has the pairs of its members."""
    index = {name: place for place, name in enumerate(layers.names)}
    fronts = {}
    for name, of_pair in errors.items():
        points = {pair: (float(layers.cost(index[name], pair)), error) for pair, error in of_pair.items()}
        fronts[name] = {pair: of_pair[pair] for pair in pareto_front(points)}
    groups = clusters(fronts, eps, members, cast(Noise, noise))
    return Space(
        members=tuple(tuple(index[name] for name in group) for group in groups),
        options=tuple(tuple(fronts[group[0]]) for group in groups),
    )


def starts_of(space: Space, errors: Errors, layers: Layers, cap: float) -> list[Pairs]:
    """Choices with the least sum of errors for their bits: the best within `cap` first, then some of fewer bits, evenly spread."""
    parts = [
        {
            pair: (
                sum((layers.cost(index, pair) for index in members), Fraction(0)),
                sum(errors[layers.names[index]][pair] for index in members),
            )
            for pair in options
        }
        for members, options in zip(space.members, space.options, strict=True)
    ]
    whole = lcm(*(cost.denominator for part in parts for cost, _ in part.values()))
    front = additive_front(
        [{pair: (int(cost * whole), error) for pair, (cost, error) in part.items()} for part in parts]
    )
    most = Fraction(cap) * sum(map(sum, layers.sizes)) * whole
    inside = [space.pairs(one.choices) for one in front if one.cost <= most]
    steps = max(1, min(_STARTS, len(inside)) - 1)
    return [inside[-1 - round(step * (len(inside) - 1) / steps)] for step in range(min(_STARTS, len(inside)))]
