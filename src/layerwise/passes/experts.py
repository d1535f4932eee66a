"""Watching fused experts: several matrices in one 3-D parameter, multiplied inside one module's forward.

There is no submodule to hook, so the products themselves are watched: while the watch is on, every product whose right-hand side is
one of the watched parameters, or one expert cut out of it, reports its rows. The module's plain implementation is used meanwhile,
since transformers' fused kernels (`grouped_mm`) hide which rows meet which expert. Which of these rows are padding is known from the
tokens that were picked for the expert.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Report = Callable[[str, int, Tensor], None]  # (layer name, expert, rows (tokens, columns))
_LINEAR = functional.linear
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_PICKS = {torch.index_select, Tensor.index_select}
_BATCHED = {torch.bmm, Tensor.bmm} | _PRODUCTS


class ExpertsWatch(TorchFunctionMode):
    """Calls `report` for each product with a watched weight. `weights`: layer name -> its 3-D parameter.

    real: (tokens of the batch,) bool, False where padding is; None: there is none. Set before each batch.
    """

    def __init__(self, weights: Mapping[str, Tensor], report: Report) -> None:
        super().__init__()
        self.report = report
        self.whole = {id(weight): name for name, weight in weights.items()}
        self.real: Tensor | None = None
        self.picked: Tensor | None = None  # `real` of the tokens that were last picked, for the products of one expert
        self.cut: dict[int, tuple[Tensor, str, int]] = {}  # id -> (kept alive so that ids stay unique, layer, expert)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and id(args[0]) in self.whole:
            expert = args[1]
            result = func(*args, **kwargs)
            if isinstance(expert, int) or (isinstance(expert, Tensor) and expert.dim() == 0):
                self.cut[id(result)] = (result, self.whole[id(args[0])], int(expert))
            return result
        if (func is _LINEAR or func in _BATCHED) and len(args) > 1:
            rows, weight = args[0], args[1]
            if id(weight) in self.cut:
                _, name, expert = self.cut[id(weight)]
                self._report(name, expert, self._real_of(rows.reshape(-1, rows.shape[-1])))
            elif id(weight) in self.whole and rows.dim() == 3 and func is not _LINEAR:
                for expert, of_expert in enumerate(rows):
                    # every expert is handed every token here; those that were not routed to it are rows of zeros
                    routed = of_expert.abs().amax(1) > 0
                    if self.real is not None and len(self.real) == len(routed):
                        routed &= self.real.to(routed.device)
                    self._report(self.whole[id(weight)], expert, of_expert[routed])
        elif self.real is not None and args and (func is Tensor.__getitem__ or func in _PICKS):
            self._pick(self.real, args[0], kwargs.get("index", args[-1]))
        return func(*args, **kwargs)

    def _report(self, name: str, expert: int, rows: Tensor) -> None:
        if len(rows):
            self.report(name, expert, rows)

    def _pick(self, real: Tensor, tokens: Any, index: Any) -> None:
        """Rows of the hidden states (tokens, hidden) are taken by their numbers."""
        whole = tokens.dim() == 2 and len(tokens) == len(real) and tokens.is_floating_point()
        if whole and isinstance(index, Tensor) and index.dim() == 1 and not index.is_floating_point():
            self.picked = real.to(index.device)[index]

    def _real_of(self, rows: Tensor) -> Tensor:
        """Those that are no padding, of the rows that meet one expert: the tokens last picked, or all of the batch in order."""
        if self.real is None:
            return rows
        for known in (self.picked, self.real):
            if known is not None and len(known) == len(rows):
                return rows[known.to(rows.device)]
        return rows


class PlainExperts:
    """For the duration, experts modules run their plain loop over experts."""

    def __init__(self, modules: list[nn.Module]) -> None:
        configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
        self.configs = [config for config in configs.values() if hasattr(config, "_experts_implementation")]

    def __enter__(self) -> None:
        self.before = [config._experts_implementation for config in self.configs]
        for config in self.configs:
            config._experts_implementation = "eager"

    def __exit__(self, *exception: object) -> None:
        for config, before in zip(self.configs, self.before, strict=True):
            config._experts_implementation = before
