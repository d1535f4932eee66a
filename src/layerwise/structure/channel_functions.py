"""What each function and method of a traced network does to the channels of its inputs: the rules by name, for `channel_rules.Reader`.

Of every tensor the axis of its channels is known and their layout; a tensor without an axis has sizes that never change. Raises ModelError
naming the operation where its effect is not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..errors import ModelError
from .channel_layout import Layout, cut_at, fix, new, tie, width
from .channel_shapes import merged_by_reshape

_ELEMENTWISE = frozenset(
    "add sub mul truediv div neg iadd isub imul itruediv add_ sub_ mul_ div_ multiply subtract relu relu_ relu6 leaky_relu elu selu celu"
    " silu gelu mish hardswish hardsigmoid hardtanh sigmoid sigmoid_ tanh tanh_ softplus clamp clamp_ exp abs sqrt square pow dropout"
    " dropout2d contiguous clone float half double to type_as detach maximum minimum".split()
)
_RESIDUAL = frozenset("add sub iadd isub add_ sub_ subtract".split())
_POOLING = frozenset(
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool1d avg_pool1d adaptive_avg_pool1d interpolate"
    " upsample".split()
)
_SOFTMAX = frozenset("softmax log_softmax softmin".split())
_RESHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze".split())


@dataclass(frozen=True)
class Seen:
    """A tensor on its way. axis: the dimension of its channels; None: none that could change."""

    shape: tuple[int, ...]
    axis: int | None = None
    layout: Layout = ()


class Functions(Interpreter):
    """Keeps what is known of every tensor (`seen`) and has a rule for every function."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # an error names its operation in one line as it is
        self.seen: dict[Node, Any] = {}

    def function(self, n: Node, inputs: list[Seen], result: Any) -> Any:
        """What is known of the result of a function or method. Raises ModelError if it has no rule."""
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
        home = getattr(n.target, "__module__", "torch") or "torch"
        if not isinstance(n.target, str) and home.split(".")[0] not in (
            "torch",
            "_operator",
            "operator",
            "builtins",
            "math",
        ):
            raise self.refused(n, f"{home}.{name} is not traced into and has no rule")
        if name in ("cat", "concat", "concatenate"):
            return self._cat(n, result, _argument(n, 1, "dim", 0))
        if name == "getitem":
            return self._getitem(n, result)
        if name == "chunk":
            return self._chunk(n, inputs[0], result, _argument(n, 2, "dim", 0))
        if name == "split":
            return self._parts(n, inputs[0], result, _argument(n, 2, "dim", 0))
        if name == "pad":
            return self._pad(n, inputs[0], result)
        if name in ("mean", "sum", "amax"):
            return self._reduced(n, inputs[0], result)
        if name in ("permute", "transpose", "swapaxes"):
            return self._permuted(n, inputs[0], result, name)
        if name in _RESHAPES:
            asked = n.args[1:] if name in ("view", "reshape") else ()
            return self.reshaped(
                n, inputs[0], result, asked[0] if asked and isinstance(asked[0], (tuple, list)) else asked
            )
        if name in _POOLING:
            return self.pooled(n, inputs[0], result)
        if name in _SOFTMAX:
            return self.softmax(inputs[0], n.args[1] if len(n.args) > 1 else n.kwargs.get("dim"))
        if name in _ELEMENTWISE:
            return self._together(n, inputs, tuple(result.shape), residual=name in _RESIDUAL)
        raise self.refused(n, f"{name} has no rule")

    def _together(self, n: Node, inputs: Sequence[Seen], shape: tuple[int, ...], *, residual: bool) -> Seen:
        """Elementwise, with broadcasting: channels that lie at one place are the same."""
        places = {one.axis - len(one.shape) for one in inputs if one.axis is not None}
        if not places:
            return Seen(shape)
        if len(places) > 1:
            raise self.refused(n, "its inputs have their channels in different dimensions")
        (place,) = places
        if -place > len(shape):
            raise self.refused(n, "its inputs cannot be aligned")
        size = shape[place]
        along = [one for one in inputs if len(one.shape) >= -place]
        whole = [one for one in along if one.shape[place] == size]
        for one in along:
            if one.axis is not None and one.shape[place] != size:
                fix(one.layout, "one channel is spread over many")
        known = [one for one in whole if one.axis is not None]
        for other in known[1:]:
            tie(known[0].layout, other.layout, residual=residual)
        if size > 1 and any(one.axis is None for one in whole):
            for one in known:
                fix(one.layout, "a tensor of the model's own lies along it")
        return Seen(shape, len(shape) + place, known[0].layout) if known else Seen(shape)

    def _cat(self, n: Node, result: Tensor, dim: int) -> Seen:
        listed = n.args[0] if n.args else n.kwargs["tensors"]
        parts: list[Seen] = [self.seen[one] for one in listed]  # type: ignore[union-attr,index]
        dim %= result.ndim
        if all(one.axis is None for one in parts):
            return Seen(tuple(result.shape))
        axis = next(one.axis for one in parts if one.axis is not None)
        parts = [self.along(n, one, axis) for one in parts]
        if dim == axis:
            return Seen(tuple(result.shape), axis, tuple(run for one in parts for run in one.layout))
        for other in parts[1:]:
            tie(parts[0].layout, other.layout)
        return Seen(tuple(result.shape), axis, parts[0].layout)

    def _getitem(self, n: Node, result: Tensor) -> Any:
        index: Any = n.args[1]
        source = self.seen[n.args[0]]  # type: ignore[index]
        if isinstance(source, list):
            return source[index]
        if source.axis is None:
            return Seen(tuple(result.shape))
        index = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(one, (slice, int, type(None), type(Ellipsis))) for one in index):
            raise self.refused(n, "indexing by tensors has no rule")
        index = _spelled_out(index, len(source.shape))
        axis = at = 0
        for one in index:  # where the channels come to lie
            if one is None:
                axis += 1
                continue
            if at == source.axis:
                break
            axis, at = axis + (not isinstance(one, int)), at + 1
        own = [one for one in index if one is not None][source.axis]
        if isinstance(own, int):
            fix(source.layout, "single channels are taken by number")
            return Seen(tuple(result.shape))
        return Seen(tuple(result.shape), axis, self._sliced(n, source, own, result.shape[axis]))

    def _sliced(self, n: Node, source: Seen, own: slice, size: int) -> Layout:
        if (own.start, own.stop) == (None, None) and own.step in (None, 1):
            return source.layout
        total, bounds = source.shape[source.axis or 0], (own.start, own.stop)
        if own.step not in (None, 1) or any(isinstance(one, Node) for one in bounds):
            fix(source.layout, "channels are taken by numbers that follow from no rule")
            if own.step not in (None, 1):
                return new(size, fixed=True, why="every so many channels are taken")
        values = [self.env[one] if isinstance(one, Node) else one for one in bounds]
        start, stop, _ = slice(*values).indices(total)
        first, rest = self._cut(source.layout, start)
        middle, last = self._cut(rest, stop - start)
        for bound, before in ((own.start, first), (own.stop, (*first, *middle))):
            if isinstance(bound, int):  # counted from the front: so many there are; from the back: so many after it
                after = (*middle, *last) if before is first else last
                fix(before if bound >= 0 else after, "channels are taken by number")
        return middle

    def _cut(self, layout: Layout, at: int) -> tuple[Layout, Layout]:
        found = cut_at(layout, at)
        if found is None:
            fix(layout, "channels are taken by number")
            total = width(layout)
            return new(at, fixed=True), new(total - at, fixed=True)
        return found

    def _chunk(self, n: Node, source: Seen, result: Sequence[Tensor], dim: int) -> list[Seen]:
        if source.axis is None or dim % len(source.shape) != source.axis:
            return [Seen(tuple(one.shape), source.axis, source.layout) for one in result]
        count = len(result)
        if source.shape[source.axis] % count:
            return self._parts(n, source, result, dim)
        tie(source.layout, (half := new(source.shape[source.axis] // count)) * count)
        return [Seen(tuple(one.shape), source.axis, half) for one in result]

    def _parts(self, n: Node, source: Seen, result: Sequence[Tensor], dim: int) -> list[Seen]:
        if source.axis is None or dim % len(source.shape) != source.axis:
            return [Seen(tuple(one.shape), source.axis, source.layout) for one in result]
        why = "it is split in parts of given sizes"
        fix(source.layout, why)
        return [Seen(tuple(one.shape), source.axis, new(one.shape[source.axis], fixed=True, why=why)) for one in result]

    def _pad(self, n: Node, x: Seen, result: Tensor) -> Seen:
        if x.axis is None or result.shape[x.axis] == x.shape[x.axis]:
            return Seen(tuple(result.shape), x.axis, x.layout)
        amounts: Any = n.args[1] if len(n.args) > 1 else n.kwargs["pad"]
        if not isinstance(amounts, (tuple, list)) or any(isinstance(one, Node) for one in amounts):
            raise self.refused(n, "it pads channels by amounts that are computed")
        at = 2 * (len(x.shape) - 1 - x.axis)
        front, back = amounts[at], amounts[at + 1]
        if min(front, back) < 0:
            raise self.refused(n, "it pads channels by less than nothing")
        pads = [new(one, fixed=True, why="zeros are put beside it") if one else () for one in (front, back)]
        return Seen(tuple(result.shape), x.axis, (*pads[0], *x.layout, *pads[1]))

    def _reduced(self, n: Node, x: Seen, result: Tensor) -> Seen:
        if x.axis is None:
            return Seen(tuple(result.shape))
        dims: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
        dims = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {int(one) % len(x.shape) for one in dims}
        if x.axis in gone:
            raise self.refused(n, "it reduces over channels")
        before = 0 if result.ndim == len(x.shape) else sum(one < x.axis for one in gone)
        return Seen(tuple(result.shape), x.axis - before, x.layout)

    def _permuted(self, n: Node, x: Seen, result: Tensor, name: str) -> Seen:
        if x.axis is None:
            return Seen(tuple(result.shape))
        rank = len(x.shape)
        order = list(range(rank))
        given: Any = n.args[1:] or tuple(n.kwargs.values())
        if name == "permute":
            given = given[0] if isinstance(given[0], (tuple, list)) else given
            order = [int(one) % rank for one in given]
        else:
            a, b = (int(one) % rank for one in given)
            order[a], order[b] = order[b], order[a]
        return Seen(tuple(result.shape), order.index(x.axis), x.layout)

    def reshaped(self, n: Node, x: Seen, result: Tensor, asked: Sequence[Any]) -> Seen:
        """asked: the sizes that the code gave, if it did."""
        if x.axis is None:
            return Seen(tuple(result.shape))
        axis, layout = merged_by_reshape(x.shape, x.axis, x.layout, tuple(result.shape), [*asked])
        return Seen(tuple(result.shape), axis, layout)

    def pooled(self, n: Node, x: Seen, result: Tensor) -> Seen:
        """Other positions, the same channels."""
        if x.axis not in (None, 1) or result.shape[1] != x.shape[1]:
            raise self.refused(n, "it pools over channels")
        return Seen(tuple(result.shape), x.axis, x.layout)

    def softmax(self, x: Seen, dim: Any) -> Seen:
        """Over positions it is each channel's own; over channels none of them can go, which outputs of the model never do. dim: None for
        torch's own choice."""
        rank = len(x.shape)
        dim = (0 if rank in (0, 1, 3) else 1) if dim is None else int(dim) % rank
        if dim == x.axis:
            fix(x.layout, "softmax mixes its channels")
        return x

    # -- helpers

    def along(self, n: Node, x: Seen, axis: int) -> Seen:
        """The tensor with its channels in this dimension. Raises ModelError if they lie in another."""
        if x.axis is None:
            return Seen(x.shape, axis, new(x.shape[axis], fixed=True, why="its input never changes"))
        if x.axis != axis:
            raise self.refused(n, f"its input has channels in dimension {x.axis}, it reads dimension {axis}")
        return x

    def refused(self, n: Node, why: str) -> ModelError:
        """The error that names an operation."""
        path = next(reversed(n.meta.get("nn_module_stack") or {"": None}), "").removeprefix("model").lstrip(".")
        own = path_of(n) if n.op == "call_module" else n.name
        where = f' in "{path}"' if path and path != own else ""
        return ModelError(
            f'"{own}"{where}: {why}, so which channels belong together is not known.'
            " Write this part of the model with other operations, or compress it by masks."
        )


def path_of(n: Node) -> str:
    """The module that a node calls, as the model names it."""
    return str(n.target).removeprefix("model").lstrip(".")


def _argument(n: Node, place: int, name: str, default: int) -> int:
    value = n.args[place] if len(n.args) > place else n.kwargs.get(name, default)
    return int(value)  # type: ignore[arg-type]


def _spelled_out(index: tuple[Any, ...], rank: int) -> list[Any]:
    """An entry for every dimension, and None where one is put in."""
    named = sum(one is not None and one is not Ellipsis for one in index)
    full = [slice(None)] * (rank - named)
    if any(one is Ellipsis for one in index):
        at = next(place for place, one in enumerate(index) if one is Ellipsis)
        return [*index[:at], *full, *index[at + 1 :]]
    return [*index, *full]
