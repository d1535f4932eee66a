"""How often each weight multiplies: tokens, patches or positions of a layer for one sample. What operations and energy are counted from."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import WalkError
from ..structure import Layer, Structure, module_of, parameter_of
from ..tasks.batches import Batch, call, count_samples
from ..tasks.undisturbed import undisturbed
from .experts import ExpertsWatch, PlainExperts
from .wrapping import cannot_run


def uses_of(model: nn.Module, structure: Structure, batch: Batch) -> dict[str, float]:
    """Layer name -> multiplications of each of its weights for one sample, by one plain forward pass; padding counts.

    Times the layer's size that is its multiply-adds. Of fused experts the mean over the experts of the tokens that came to them; 0 for a
    layer that is not called. Windows folded into the batch count as what they are, parts of one sample. A model on the meta device will
    do, with tensors that are there too. Raises WalkError if the model cannot run on the batch.
    """
    rows = dict.fromkeys((layer.name for layer in structure), 0.0)

    def add(name: str, count: float) -> None:
        rows[name] += count

    fused = [layer for layer in structure if layer.kind == "experts"]
    handles = []
    try:
        for layer in structure:
            if layer.kind not in ("experts", "embedding", "table"):
                hook = partial(_counted, layer, add)
                handles.append(module_of(model, layer).register_forward_hook(hook, with_kwargs=True))
        with undisturbed([model]), _Watched(model, fused, add):
            try:
                call(model, batch)
            except Exception as error:  # the model's own code: any class may come out
                raise error if isinstance(error, WalkError) else cannot_run(error, 0, None) from error
    finally:
        for handle in handles:
            handle.remove()
    samples = count_samples([batch])
    return {name: count / samples for name, count in rows.items()}


def _counted(
    layer: Layer,
    add: Callable[[str, float], None],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Rows of the output: of a convolution its positions, of anything else its tokens."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise WalkError(f'layer "{layer.name}" gives no tensor, so its multiplications cannot be counted; exclude it.')
    add(layer.name, first.numel() / (layer.rows * (layer.matrices if layer.kind == "conv" else 1)))


class _Watched:
    """Fused experts' products, counted while it lasts."""

    def __init__(self, model: nn.Module, fused: list[Layer], add: Callable[[str, float], None]) -> None:
        sizes = {layer.name: layer.matrices for layer in fused}
        self._contexts: list[Any] = []
        if fused:
            weights = {layer.name: parameter_of(model, layer) for layer in fused}
            watch = ExpertsWatch(weights, lambda name, expert, rows: add(name, len(rows) / sizes[name]))
            self._contexts = [PlainExperts([module_of(model, layer) for layer in fused]), watch]

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)
