"""Quantized models are not trained whole: every step would take their weights off the grid that they are stored on."""

from torch import nn

from ..errors import ModelError


def refuse_quantized(model: nn.Module) -> None:
    """Raise ModelError where weights that lie on a grid take gradients: `layerwise.load` and `compress` mark such models, transformers'
    loaders of quantized checkpoints say it in the config."""
    on_grid = set(getattr(model, "layerwise_quantized", ()))
    said = quantized_by_loader(model)
    if not on_grid and not said:
        return
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0].removesuffix(".base_layer")  # as an adapter renames it
        if parameter.requires_grad and (
            {name, layer} & on_grid or (said and parameter.ndim > 1 and "adapter" not in _kind(model))
        ):
            raise ModelError(
                f'"{name}" is quantized: training would take it off its grid. Train an adapter beside it'
                " (layerwise.recover.add_adapter), or recover before quantizing; a model that is dense again must be loaded anew."
            )


def quantized_by_loader(model: nn.Module) -> bool:
    """Whether the model says that transformers loaded it quantized."""
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def _kind(model: nn.Module) -> str:
    return "adapter" if getattr(model, "layerwise_adapter", None) is not None else ""
