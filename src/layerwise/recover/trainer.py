"""Masks in the stock transformers Trainer, as a callback: the optimiser is watched, and every checkpoint holds the masks.

To go on from a checkpoint, make the masks again from the same plan and seed, or read them back with `masks_of(checkpoint)`. Weights
of the checkpoint that are not zero where the masks prune are an error: they were trained under other masks.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from .masks import Masks


class MasksCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """`Trainer(..., callbacks=[Masks(model, keep).callback()])`; gradient accumulation, clipping and resuming included."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint was read, if one was. Raises ConfigError if its weights were trained under other masks,
        or the parameters are not those of the masks."""
        if not self.masks.holds_in(kwargs["model"]):
            raise ConfigError(
                "the model that is trained has other parameters than the one the masks are held on: sharded ones (FSDP, DeepSpeed"
                " ZeRO-3) are not supported, and adapters must be added before."
            )
        if state.global_step and (leaked := self.masks.leaked()):
            raise ConfigError(
                f"{leaked} weights of the checkpoint are not zero where these masks prune: it was trained with others."
                " Hold its own: masks_of(checkpoint)."
            )
        self.masks.apply()
        self.masks.watch(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once more, for optimisers that are not torch's and call no hooks; costs one pass over the masked weights."""
        self.masks.apply()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside the weights of the checkpoint."""
        if state.is_world_process_zero:
            self.masks.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
