"""Units to keep, drawn at random, and what models give: for the tests of shrinking."""

import random

import torch


def drawn(coupling, seed, kinds=("heads", "channels")):
    """Units to keep of every group, at random: at least one, each layer its own number."""
    draw = random.Random(seed)  # noqa: S311
    return {
        group.name: sorted(
            draw.sample(range(group.units), group.multiple * draw.randint(1, group.units // group.multiple))
        )
        for group in coupling.groups
        if group.kind in kinds
    }


def outputs(model, batch):
    with torch.no_grad():
        found = model.eval()(**batch) if isinstance(batch, dict) else model.eval()(batch)
    if isinstance(found, torch.Tensor):
        return [found]
    return [one for one in found.values() if isinstance(one, torch.Tensor)]
