"""Write a model by its library's own `save_pretrained`: a stock folder, or plain weights for a module of another class."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LayerwiseError, SaveError
from ..tasks.undisturbed import quiet
from .places import Loader, loader_of
from .whole import is_disk_full


def write_own_names(model: nn.Module, folder: Path) -> None:
    """Write the weights again under the names that the model has, where transformers renames them on the way (ViT)."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        write_model(model, folder, save_original_format=False)


def write_model(model: nn.Module, folder: Path, **options: bool) -> Loader | None:
    """Write config and weights; the loader that the folder promises, or None for a module of the user's own class.

    options: of the library's `save_pretrained`.
    """
    try:
        write: Any = getattr(model, "save_pretrained", None)
        if write is None:
            from safetensors.torch import save_model

            save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
            return None
        with quiet(), _any_generation_config(model, folder):
            write(folder, **options)
        return loader_of(folder, remote_code=True)
    except LayerwiseError:
        raise
    except Exception as error:  # the library's own code: any class may come out
        if is_disk_full(error):  # `whole_folder` says so
            raise
        raise SaveError(f"{type(model).__name__} cannot be written: {str(error).splitlines()[0]}") from error


@contextmanager
def _any_generation_config(model: nn.Module, folder: Path) -> Iterator[None]:
    """Transformers refuses to write a generation config that it calls inconsistent, though many published models have one.

    The model's own is kept word for word: a default one stands in while the library writes, then the file is written over.
    """
    own: Any = getattr(model, "generation_config", None)
    if own is None or not hasattr(own, "to_json_file"):
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    own.to_json_file(folder / "generation_config.json")
