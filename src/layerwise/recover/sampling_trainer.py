"""Layer sampling in the stock transformers Trainer, as a callback: freezes after the optimiser was built, resumes from any checkpoint.

What a checkpoint needs is a few plain values in its `trainer_state.json`; with `restore_callback_states_from_checkpoint` or without.
"""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import ConfigError
from .sampling import LayerSampling


def callback_of(sampling: LayerSampling) -> TrainerCallback:
    """`Trainer(..., optimizers=(optimizer, None), callbacks=[sampling.callback()])`; the Trainer may make a new one when it resumes."""

    class LayerSamplingCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is not typed
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"sampling_state": sampling.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """After a checkpoint was read, if one was; see `_check`."""
            _check(sampling, args, kwargs["model"])
            if state.global_step:
                stored = state.stateful_callbacks.get(type(self).__name__)
                if stored is None:
                    raise ConfigError(
                        "the checkpoint was written without layer sampling: it cannot be resumed with it. Start from its weights as a"
                        " model instead."
                    )
                sampling.load_state_dict(stored["attributes"]["sampling_state"])
            sampling.watch(kwargs["optimizer"])

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sampling.at(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sampling.release()

    return LayerSamplingCallback()


def _check(sampling: LayerSampling, args: Any, model: Any) -> None:
    """Raise ConfigError where freezing and thawing cannot work: sharded parameters, processes that would wait for each other."""
    if not sampling.holds_in(model):
        raise ConfigError(
            "the model that is trained has other parameters than the one the blocks are drawn from: sharded ones (FSDP, DeepSpeed ZeRO)"
            " are not supported, and adapters must be added before."
        )
    if args.world_size > 1 and not args.ddp_find_unused_parameters:
        raise ConfigError(
            "blocks that are frozen have no gradients to wait for: set ddp_find_unused_parameters=True in the TrainingArguments."
        )
