"""Which weights an adapter may change: masks by layer, and the entries that shira trains."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..randomness import generator_for


def masks_for(model: nn.Module, names: list[str], keep: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Layer -> mask. Raises ConfigError for a mask of another shape, or of a layer that gets no adapter."""
    given = {name.removesuffix(".weight"): mask for name, mask in (keep or {}).items()}
    if odd := sorted(given.keys() - {*names}):
        raise ConfigError(f'mask of "{odd[0]}": no linear in a block of the model. Leave it out.')
    masks = {}
    for name in names:
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        mask = given.get(name)
        if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
            raise ConfigError(
                f'mask of "{name}": {mask.dtype} {tuple(mask.shape)}; give torch.bool {tuple(weight.shape)}.'
            )
        if mask is not None and bool((weight.detach()[~mask.to(weight.device)] != 0).any()):
            raise ConfigError(f'mask of "{name}": the weight is not zero where it prunes. Prune first.')
        masks[name] = (weight.detach() != 0) if mask is None else mask.to(weight.device)
    return masks


def entries_of(name: str, keep: Tensor, rank: int, seed: int) -> Tensor:
    """Ones at rank * (outputs + inputs) of the kept entries, drawn at random; float like `keep`."""
    wanted, places = rank * sum(keep.shape), keep.flatten().nonzero().flatten().cpu()
    if wanted > len(places):
        most = len(places) // sum(keep.shape)
        raise ConfigError(
            f'layer "{name}" keeps {len(places)} weights, fewer than the {wanted} that shira trains at rank {rank}: give rank'
            f" {most} or less."
        )
    chosen = places[torch.randperm(len(places), generator=generator_for(seed, f"shira:{name}"))[:wanted]]
    mask = torch.zeros(keep.numel())
    mask[chosen] = 1.0
    return mask.view(keep.shape).to(keep.device)
