"""Channels cut out of a trained convolutional network: equal to zeroing all that reads them, up to rounding."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..structure import Channels
from ..structure.channel_parts import coupling_of, entries
from .crop import set_sizes
from .cut import Keep, cut_units, zero_out


def shrink_channels(model: nn.Module, keep: Keep, channels: Channels) -> None:
    """Keep these units of these groups of `channels` (`structure.cnn_channels` of this model), in place; the others stay whole.

    Parameters are new ones: make optimisers afterwards. Statistics of batch norms go with their channels. Group and layer norms
    normalise over what is left, so that there removing is not zeroing. Raises ModelError and ConfigError as `shrink`; nothing has
    changed then.
    """
    cut_units(model, keep, coupling_of(model, channels))
    _cut_statistics(model, keep, channels)
    widths = {name: len(units) for name, units in keep.items()}
    for layer in channels.layers:
        set_sizes(model.get_submodule(layer.name), layer, *channels.sizes(layer, widths))


def zero_channels(model: nn.Module, keep: Keep, channels: Channels) -> None:
    """The same in zeros: everything that reads a removed unit."""
    zero_out(model, keep, coupling_of(model, channels))


def _cut_statistics(model: nn.Module, keep: Mapping[str, Sequence[int]], channels: Channels) -> None:
    for layer in channels.layers:
        module = model.get_submodule(layer.name)
        for own in ("running_mean", "running_var"):
            buffer = module._buffers.get(own)
            if buffer is None:
                continue
            stays = torch.ones(len(buffer), dtype=torch.bool, device="cpu")
            for name, index in entries(layer.outputs).items():
                if name in keep:
                    gone = torch.ones(len(index), dtype=torch.bool, device="cpu")
                    gone[list(keep[name])] = False
                    stays[index[gone].flatten()] = False
            module._buffers[own] = buffer[stays.to(buffer.device)].clone()
