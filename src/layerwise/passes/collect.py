"""Collecting input statistics while a block runs: one sum per distinct input, not one per layer.

q, k and v see the same tensor, so do gate and up: layers that are handed the same tensor object share an accumulator, and the
engine solves them together. Which layers share is seen on the first batch and held against every later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import WalkError
from ..structure import Layer, module_of, parameter_of
from .experts import ExpertsWatch, PlainExperts
from .paused import Arguments, Enough, Pass
from .rows import geometry_of, input_rows, mask_of, real_of, real_tokens
from .statistics import Accumulator, InputStatistics, Need


@dataclass(eq=False)
class SharedInput:
    """Layers that see the same input, with its statistics: one entry per matrix (group, expert)."""

    layers: list[Layer] = field(default_factory=list)
    accumulators: list[Accumulator | None] = field(default_factory=list)
    born: int = 0  # the batch that first called these layers
    inputs: int = 0  # distinct inputs seen in this batch

    def statistics(self) -> list[InputStatistics | None]:
        """One for each matrix; None where no token came. Raises StatisticsError if one is not finite."""
        results = [one.result() if one is not None else None for one in self.accumulators]
        for result in results:
            if result is not None:
                result.check(self.layers[0].name)
        return results


class Collector:
    """Hooks on the layers of one block. Use as a context around the runs of the block, each by `run`.

    With `stop_early`, a run ends (paused.Enough) as soon as the last layer has been handed its input, which saves that layer's
    own product; only where each layer is called exactly once.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], need: Need, *, stop_early: bool) -> None:
        self.model, self.layers, self.need, self.stop_early = model, layers, need, stop_early
        self.shared: dict[str, SharedInput] = {}  # by layer name
        self.calls: dict[str, int] = {}
        self._once = False  # in the first batch, each layer was called exactly once
        self._batches = 0
        self._seen: dict[tuple[int, Any], tuple[list[SharedInput], Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._hooks: dict[str, Arguments] = {}  # path of a layer's module -> its hook
        self._contexts: list[Any] = []
        self._watch: ExpertsWatch | None = None
        self._mask: Tensor | None = None

    def __enter__(self) -> "Collector":
        hooked = [layer for layer in self.layers if layer.kind != "experts"]
        fused = [layer for layer in self.layers if layer.kind == "experts"]
        for layer in hooked:
            module, hook = module_of(self.model, layer), self._hook(module_of(self.model, layer), layer)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._hooks[layer.parameter.rpartition(".")[0]] = partial(hook, module)
        if fused:
            for layer in fused:
                self.shared[layer.name] = SharedInput([layer], [None] * layer.matrices)
            watch = ExpertsWatch(
                {layer.name: parameter_of(self.model, layer) for layer in fused},
                lambda name, expert, rows: self._add(self.shared[name], expert, rows),
            )
            self._watch = watch
            self._contexts = [PlainExperts([module_of(self.model, layer) for layer in fused]), watch]
        self.stop_early = self.stop_early and not fused
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for context in reversed(self._contexts):
            context.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        # hooks know their collector: this circle would keep model and sums until Python looks for circles
        self._hooks.clear()
        self._handles.clear()
        self._contexts.clear()
        self._watch = None

    def run(self, one: Pass, device: torch.device | None = None, *, fresh: bool = False) -> Any:
        """`one.run`, with what its layers are handed counted; also where the block is a layer itself, as a head or a stem is."""
        self._begin(one)
        return one.run(device, fresh=fresh, watch=self._hooks.get(one.block or ""))

    def _begin(self, one: Pass) -> None:
        if self._batches == 1:
            self._once = bool(self.calls) and all(self.calls.get(layer.name) == 1 for layer in self.layers)
        self._check_sharing()
        self._batches += 1
        self.calls = {}
        self._seen.clear()
        self._mask = mask_of(self.model, one.batch, one.block or "")
        if self._watch is not None:
            self._watch.real = real_of(self._mask)
            self._watch.picked = None

    def groups(self) -> list[SharedInput]:
        """The distinct inputs with their layers, in the order of the layers; a layer never called has no statistics."""
        self._check_sharing()
        for layer in self.layers:
            self.shared.setdefault(layer.name, SharedInput([layer], [None] * layer.matrices))
        unique = {id(group): group for group in (self.shared[layer.name] for layer in self.layers)}
        return list(unique.values())

    def _hook(self, module: nn.Module, layer: Layer) -> Any:
        geometry = geometry_of(module)

        def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs.get("input", kwargs.get("hidden_states"))
            if not isinstance(inputs, Tensor):
                raise WalkError(f'layer "{layer.name}" was not handed a tensor; exclude it.')
            # the tensor is held, so that its id stays its own
            groups, _ = self._seen.setdefault((id(inputs), geometry), ([], inputs))
            mine = self.shared.get(layer.name)
            if mine is None:
                # only a group that is as young as this layer has the same history
                mine = next((group for group in groups if group.born == self._batches), None)
                mine = self.shared[layer.name] = mine or SharedInput([], [None] * layer.matrices, self._batches)
                mine.layers.append(layer)
            if mine not in groups:
                groups.append(mine)
                mine.inputs += 1
                rows = real_tokens(input_rows(module, layer, inputs), inputs, self._mask)
                for index, of_matrix in enumerate(rows):
                    self._add(mine, index, of_matrix)
            self.calls[layer.name] = self.calls.get(layer.name, 0) + 1
            if self.stop_early and self._once and len(self.calls) == len(self.layers):
                raise Enough

        return before

    def _check_sharing(self) -> None:
        """In the batch just done, did every layer of a group see each of the group's inputs?"""
        for group in set(self.shared.values()):
            odd = [layer.name for layer in group.layers if self.calls.get(layer.name, 0) != group.inputs]
            if odd and len(group.layers) > 1:
                raise WalkError(
                    f'layer "{odd[0]}" shares its input with other layers in some batches only; exclude it.'
                )
            group.inputs = 0

    def _add(self, group: SharedInput, index: int, rows: Tensor) -> None:
        accumulator = group.accumulators[index]
        if accumulator is None:
            accumulator = group.accumulators[index] = Accumulator(rows.shape[-1], self.need, rows.device)
        accumulator.add(rows)
