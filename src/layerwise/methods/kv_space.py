"""What KVTuner may choose: groups of layers, and the pairs of bits that each group has left."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

Pair = tuple[int, int]
Pairs = tuple[Pair, ...]
"""(bits of keys, bits of values) of every layer, in order."""


@dataclass(frozen=True)
class Space:
    """members: for each group the indices of its layers, each layer in one group. options: for each group its pairs, fewest bits first."""

    members: tuple[tuple[int, ...], ...]
    options: tuple[Pairs, ...]

    def __post_init__(self) -> None:
        every = sorted(itertools.chain(*self.members))
        if every != list(range(len(every))) or len(self.members) != len(self.options):
            raise ConfigError("Space: groups must cover each layer once, and each have its options.")

    @property
    def size(self) -> int:
        """How many choices there are."""
        return math.prod(len(options) for options in self.options)

    def pairs(self, chosen: Sequence[Pair]) -> Pairs:
        """One pair for each group -> one for each layer."""
        of_layer = {layer: pair for layers, pair in zip(self.members, chosen, strict=True) for layer in layers}
        return tuple(of_layer[index] for index in range(len(of_layer)))

    def chosen(self, places: Sequence[int]) -> Pairs:
        """The place of an option for each group -> one pair for each layer."""
        return self.pairs([options[place] for options, place in zip(self.options, places, strict=True)])

    def places(self, pairs: Pairs) -> dict[str, int] | None:
        """The parameters of a trial that stand for these pairs, or None where a group has no such choice."""
        found = {}
        for number, (layers, options) in enumerate(zip(self.members, self.options, strict=True)):
            of_group = {pairs[layer] for layer in layers}
            if len(of_group) != 1 or not of_group <= set(options):
                return None
            found[f"group{number}"] = options.index(of_group.pop())
        return found
