"""How much a block changes what goes through it: Block Influence of ShortGPT (Men et al. 2024, arXiv:2403.03853)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils._pytree import tree_leaves

from ..errors import ScoreError
from ..passes import PausedPasses, at_hand
from ..passes.rows import mask_of, real_tokens
from ..structure import Structure
from ..tasks.batches import Batches
from .watching import tell


def mean_turn(before: Tensor, after: Tensor) -> float:
    """1 - mean cosine between the rows of `before` and `after`, both (tokens, hidden); 0: directions unchanged, 2: reversed.

    A row of zeros on either side has cosine 0. Raises ScoreError if a value is not finite, or there are no rows.
    """
    if not before.shape[0]:
        raise ScoreError("mean_turn: there are no tokens.")
    cosines = cosine_similarity(before.float(), after.float(), dim=-1)
    turn = 1 - float(cosines.mean())
    if math.isnan(turn):
        raise ScoreError("mean_turn: a hidden state is not finite.")
    return turn


def block_influence(model: nn.Module, data: Batches, structure: Structure) -> dict[str, float]:
    """Block name -> 1 - mean cosine between the hidden states that enter and leave it, over all tokens; high = keep.

    What `turns` says, which has the details.
    """
    return turns(model, data, structure, {})


def turns(model: nn.Module, data: Batches, structure: Structure, through: Mapping[str, nn.Module]) -> dict[str, float]:
    """Block name -> `mean_turn` of its hidden states, over all tokens.

    On the dense model, one forward pass; positions whose attention mask is 0 do not count. The hidden state is the block's first
    floating tensor with a token or channel axis, and what leaves is the first tensor of its shape; of images (batch, channels, height,
    width) each position is a token. A block that changes the shape could not be left out and is not in the result.
    through: block name -> module that what leaves it goes through first. Raises ScoreError naming the block if a hidden state is not
    finite.
    """
    names = [block.name for block in structure.blocks]
    sums: dict[str, list[tuple[int, float]]] = {}
    with PausedPasses(model, names, data) as passes:
        for done, (name, standing) in enumerate(passes):
            tell(done, len(names), name)
            outputs = []
            with at_hand(model, name):
                for one in standing:
                    mask = mask_of(model, one.batch, name)
                    before = _rows(_first_state(one.arguments), mask)  # a copy: a block may write into its input
                    outputs.append(one.run())
                    left = _like(_first_state(one.arguments), outputs[-1])
                    if left is not None and name in through:
                        with torch.no_grad():
                            left = through[name](left)
                    after = _rows(left, mask)
                    if before is None or after is None:
                        continue
                    try:
                        sums.setdefault(name, []).append((before.shape[0], mean_turn(before, after)))
                    except ScoreError as error:
                        raise ScoreError(f'block "{name}": {error}') from error
            for one, output in zip(standing, outputs, strict=True):
                one.go_on(output)
            del outputs
    tell(len(names), len(names))
    return {
        name: sum(tokens * turn for tokens, turn in sums[name]) / sum(tokens for tokens, _ in sums[name])
        for name in names
        if name in sums
    }


def _first_state(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor | None:
    """The hidden state among a block's arguments: the one called so, or the first floating tensor of three axes or more (two if none)."""
    args, kwargs = arguments
    named = kwargs.get("hidden_states")
    if isinstance(named, Tensor):
        return named
    floating = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    deep = [leaf for leaf in floating if leaf.ndim > 2]
    return next(iter(deep or [leaf for leaf in floating if leaf.ndim == 2]), None)


def _like(state: Tensor | None, output: Any) -> Tensor | None:
    """The first tensor of the output that has the shape of `state`."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return next((leaf for leaf in leaves if state is not None and leaf.shape == state.shape), None)


def _rows(state: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(tokens, hidden), a copy, padding left out."""
    if state is None:
        return None
    if state.ndim == 4:  # an image
        return state.movedim(1, -1).reshape(-1, state.shape[1]).clone()
    return real_tokens(state.reshape(1, -1, state.shape[-1]), state, mask)[0].clone()
