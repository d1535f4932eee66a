"""A linear in factors: y = A (S (B x)) + bias, batched products of small blocks around a sparse core, as ARMOR leaves it.

On CUDA, in 16 bits, a 2:4 core runs by torch's semi-structured kernels once its pattern and shape are checked: their packers take any
matrix and drop what does not fit. Everywhere else the core is a dense matrix with zeros, and nothing is gained in speed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, ShapeError
from ..solvers.factors import Factors, spread_out, unpack

SIXTEEN = (torch.float16, torch.bfloat16)


class ArmorLinear(nn.Module):
    """In the place of a linear, or of transformers' `Conv1D`. Takes and gives any dtype; computes in that of its factors.

    Parameters left, values, right and bias, buffer bits: see `Factors`. They can be trained; which entries are kept stays. `sparse`: False
    keeps the core dense also where a sparse kernel would run it (`fastest_cores`). turned: it stands for a `Conv1D`, whose weight is
    (inputs, outputs); factors are (outputs, inputs) always. The core is put together once and kept: after values changed through `.data`,
    which PyTorch does not count, it is the old one. Change them under `torch.no_grad()` instead.
    """

    sparse: bool = True

    def __init__(self, factors: Factors, bias: Tensor | None = None, *, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.out_features, self.in_features = factors.shape
        self.n, self.m = factors.n, factors.m
        self.left = nn.Parameter(factors.left.detach().clone())
        self.values = nn.Parameter(factors.values.detach().clone())
        self.right = nn.Parameter(factors.right.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.bits: Tensor
        self.register_buffer("bits", factors.bits.detach().clone())
        self._made: tuple[tuple[Tensor, Tensor, int], Tensor, str] | None = None  # of what, the core to run, how

    @property
    def factors(self) -> Factors:
        """What the module has now, sharing its memory."""
        return Factors(self.left.data, self.values.data, self.bits, self.right.data, self.n, self.m)

    @property
    def weight(self) -> Tensor:
        """The factors multiplied out, (outputs, inputs); computed at every access."""
        return self.factors.weight().to(self.values.dtype)

    @property
    def kernel(self) -> str:
        """How the core runs where the module is: "semi-structured", or "dense" and why."""
        return self._core()[1]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs)."""
        rows = x.reshape(-1, self.in_features).to(self.values.dtype)
        rows = times_blocks(rows, self.right)
        if torch.is_grad_enabled() and self.values.requires_grad:
            core = spread_out(self.values, unpack(self.bits, self.in_features))
        else:
            core, _ = self._core()
        rows = times_blocks(nn.functional.linear(rows, core), self.left)
        if self.bias is not None:
            rows = rows + self.bias
        return rows.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _core(self) -> tuple[Tensor, str]:
        """The core as it runs here, made once for the values, device and dtype that there are."""
        values = self.values
        version = 0 if values.is_inference() else values._version
        if self._made is None or not _same(self._made[0], values, self.bits, version):
            core = self.factors.core()
            why = why_dense(core, self.n, self.m) or (None if self.sparse else "faster so, as measured")
            if why is None:
                core = torch.sparse.to_sparse_semi_structured(core)
            # what it was made of is kept, so that no other tensor can come to lie at the same place
            self._made = (
                (values.detach(), self.bits, version),
                core,
                "semi-structured" if why is None else f"dense: {why}",
            )
        return self._made[1], self._made[2]

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own core: a packed one knows neither copying nor other devices."""
        return {**self.__dict__, "_made": None}

    def extra_repr(self) -> str:
        block = self.left.shape[-1]
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.n}:{self.m}, block={block}"


def _same(of: tuple[Tensor, Tensor, int], values: Tensor, bits: Tensor, version: int) -> bool:
    same = (a.data_ptr() == b.data_ptr() and a.device == b.device for a, b in zip(of[:2], (values, bits), strict=True))
    return all(same) and of[0].dtype == values.dtype and of[2] == version


def times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """rows @ blockdiag(blocks)^T. rows: (tokens, k * b), blocks: (k, b, b)."""
    split = rows.view(rows.shape[0], blocks.shape[0], blocks.shape[1]).transpose(0, 1)
    return torch.bmm(split, blocks.mT).transpose(0, 1).reshape(rows.shape)


def why_dense(core: Tensor, n: int = 2, m: int = 4) -> str | None:
    """Why torch's semi-structured kernels do not run this core; None if they do. Raises ShapeError if it is not n of every m."""
    check_pattern(core, n, m)
    if core.device.type != "cuda":
        return f"no semi-structured kernels on {core.device.type}"
    if (n, m) != (2, 4):
        return f"the kernels are for 2:4, not {n}:{m}"
    if core.dtype not in SIXTEEN:
        return f"{str(core.dtype).removeprefix('torch.')} is not a 16-bit float"
    if torch.cuda.get_device_capability(core.device) < (8, 0):
        return "the device is older than Ampere"
    rows, columns = (32, 64) if _cutlass() else (16, 16)
    if core.shape[0] % rows or core.shape[1] % columns:
        return (
            f"the kernels need multiples of {rows} outputs and {columns} inputs, not {core.shape[0]} x {core.shape[1]}"
        )
    return None


def check_pattern(core: Tensor, n: int = 2, m: int = 4) -> None:
    """Raise ShapeError unless the matrix is contiguous and has at most n non-zeros in every m consecutive entries of a row."""
    if core.dim() != 2 or not core.is_contiguous() or core.shape[1] % m:
        raise ShapeError(f"a core of shape {tuple(core.shape)} is no contiguous matrix in groups of {m}.")
    crowded = int((torch.count_nonzero(core.view(-1, m), dim=1) > n).sum())
    if crowded:
        raise ShapeError(f"{crowded} groups of {m} have more than {n} non-zeros: this is no {n}:{m} core.")


def fastest_cores(model: nn.Module, rows: int) -> dict[str, str]:
    """Time every core on `rows` tokens at once, sparse and dense, and keep the faster way; for inference, where the model will run.

    Sparse kernels gain on large matrices with many rows and may lose by far on few, as in decoding. Returns name -> `kernel`.
    Each shape is timed once; nothing is timed where there is no sparse kernel.
    """
    faster: dict[tuple[object, ...], bool] = {}
    for module in armor_linears(model).values():
        module.sparse, module._made = True, None
        core, kernel = module._core()
        if kernel == "semi-structured":
            shape = (*module.factors.shape, core.dtype, core.device)
            if shape not in faster:
                faster[shape] = _seconds(core, rows) < _seconds(module.factors.core(), rows)
            module.sparse = faster[shape]
            module._made = module._made if module.sparse else None
    return {name: module.kernel for name, module in armor_linears(model).items()}


@torch.no_grad()
def _seconds(core: Tensor, rows: int) -> float:
    """Median of one product with so many rows."""
    from torch.utils.benchmark import Timer

    inputs = torch.randn(rows, core.shape[1], device=core.device, dtype=core.dtype)
    timer = Timer("linear(inputs, core)", globals={"linear": nn.functional.linear, "inputs": inputs, "core": core})
    return float(timer.blocked_autorange(min_run_time=0.05).median)


def _cutlass() -> bool:
    from torch.sparse import SparseSemiStructuredTensor

    return bool(SparseSemiStructuredTensor._FORCE_CUTLASS)


def armor_linears(model: nn.Module) -> dict[str, ArmorLinear]:
    """Name -> module of every linear in factors."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ArmorLinear)}


def factored(model: nn.Module, factors: Mapping[str, Factors]) -> dict[str, nn.Module]:
    """Put linears in factors in the place of these layers. Returns what was there: `put_back`.

    Raises ModelError, the model unchanged, for a layer that is absent, no linear, shared, or of another shape.
    """
    replaced: dict[str, nn.Module] = {}
    new: dict[str, ArmorLinear] = {}
    for name, one in factors.items():
        replaced[name] = module = _linear(model, name)
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)  # noqa: S101  (_linear has seen it)
        shape = tuple(weight.shape)[::-1] if is_turned(module) else tuple(weight.shape)
        if shape != one.shape:
            raise ModelError(f'factors of "{name}" are {list(one.shape)}, its weight is {list(shape)}.')
        new[name] = ArmorLinear(one.to(weight.device), bias, turned=is_turned(module)).train(module.training)
    put_back(model, new)
    return replaced


def put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set submodules by name."""
    for name, module in modules.items():
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, module)


def multiplied_out(model: nn.Module) -> nn.Module:
    """Every linear in factors replaced by a plain one with the product (a `Conv1D` by a `Conv1D`), in place; returns the model."""
    for name, module in armor_linears(model).items():
        with torch.device("meta"):
            linear = _plain(module)
        linear.weight = nn.Parameter(module.weight.T.contiguous() if module.turned else module.weight)
        linear.register_parameter("bias", module.bias)
        put_back(model, {name: linear.train(module.training)})
    return model


def _plain(module: ArmorLinear) -> nn.Module:
    if not module.turned:
        return nn.Linear(module.in_features, module.out_features)
    from transformers.pytorch_utils import Conv1D

    conv1d: nn.Module = Conv1D(module.out_features, module.in_features)
    return conv1d


def is_turned(module: nn.Module) -> bool:
    """Whether its weight is stored (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"


def unfactorable(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Layer -> why it cannot be a linear in factors, for those that cannot."""
    found = {}
    for name in names:
        try:
            _linear(model, name)
        except ModelError as error:
            found[name] = str(error)
    return found


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f'factors are for "{name}", which is no module of the model.') from error
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear and not is_turned(module):
        raise ModelError(f'"{name}" is a {type(module).__name__}; factors are for linears.')
    if sum(weight is parameter for _, parameter in model.named_parameters(remove_duplicate=False)) != 1:
        raise ModelError(f'"{name}" shares its weight with another module, so that it cannot be in factors.')
    return module
