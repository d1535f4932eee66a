"""One way to look at every weight: matrices of (outputs, inputs)."""

from torch import Tensor, nn

from ..errors import ModelError, ShapeError
from .parts import Layer, Structure


def parameter_of(model: nn.Module, layer: Layer) -> nn.Parameter:
    """The parameter that holds this layer's weight. Raises ModelError if the model has none of that name or shape."""
    try:
        parameter = model.get_parameter(layer.parameter)
    except AttributeError as error:
        raise ModelError(f'layer "{layer.name}": the model has no parameter "{layer.parameter}".') from error
    if tuple(parameter.shape) != layer.shape:
        raise ModelError(
            f'layer "{layer.name}": its shape is {tuple(parameter.shape)}, not {layer.shape} as found before.'
        )
    return parameter


def module_of(model: nn.Module, layer: Layer) -> nn.Module:
    """The module whose forward sees the input of this layer; for fused experts the experts module."""
    try:
        return model.get_submodule(layer.parameter.rpartition(".")[0])
    except AttributeError as error:
        raise ModelError(f'layer "{layer.name}": the model has no such module.') from error


def in_order(model: nn.Module, structure: Structure) -> list[Layer]:
    """Its layers in the order of the model, those outside blocks at their place: the best that is known of the order they run in."""
    position = {name: index for index, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted(structure.layers, key=lambda layer: position[layer.parameter])


def as_matrices(weight: Tensor, layer: Layer) -> Tensor:
    """(matrices, rows, columns) from a tensor of the stored shape; shares its memory where it is contiguous.

    A convolution's columns are (inputs of the group, kernel height, kernel width) flattened, the order of `torch.nn.functional.unfold`.
    """
    if tuple(weight.shape) != layer.shape:
        raise ShapeError(
            f'layer "{layer.name}" is stored as {layer.shape}; a tensor of {tuple(weight.shape)} was given.'
        )
    if layer.transposed:
        return weight.reshape(layer.matrices, layer.columns, layer.rows).transpose(1, 2)
    return weight.reshape(layer.matrices, layer.rows, layer.columns)


def from_matrices(matrices: Tensor, layer: Layer) -> Tensor:
    """The stored shape from (matrices, rows, columns): the inverse of `as_matrices`."""
    expected = (layer.matrices, layer.rows, layer.columns)
    if tuple(matrices.shape) != expected:
        raise ShapeError(
            f'layer "{layer.name}" has matrices of {expected}; a tensor of {tuple(matrices.shape)} was given.'
        )
    return (matrices.transpose(1, 2) if layer.transposed else matrices).reshape(layer.shape)
