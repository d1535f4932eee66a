"""Models larger than memory: blocks are read from safetensors for their turn, and written shard by shard.

`load_streamed` builds the model with its blocks' parameters on the meta device and everything else (embeddings, head, norms, buffers)
in memory. Whatever walks over blocks brings each in through `passes.at_hand`. A compressed block is kept in the work folder and read from
there afterwards; `save_streamed` copies block after block into the new folder. Peak memory: the largest block, what is outside blocks,
and the activations of the paused passes.
"""

import ctypes
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ModelError, SaveError
from ..shrink import is_narrow
from ..structure import structure_of
from ..tasks.undisturbed import quiet
from .factored_read import RECORD, FactoredFolder, factored_folder
from .packed_read import PackedFolder, dtype_in, packed_folder
from .places import loader_of, model_folder, read_config
from .weights import check_file, weight_files


class BlockFiles:
    """The store of a streamed model (`passes.residency.Store`): which file has which tensor of which block."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        where: Mapping[str, Path],
        blocks: list[str],
        dtype: torch.dtype | None,
        packed: PackedFolder | FactoredFolder | None = None,
    ) -> None:
        self.model, self.folder, self.dtype, self.packed = model, folder, dtype, packed
        self.where = dict(where)  # full tensor name -> file
        self.codes = (
            set(packed.weights) if packed else set()
        )  # the names whose weights the files have as codes or factors
        names = [name for name in model.state_dict() if name in self.where]
        self.names = {block: [name for name in names if name.startswith(f"{block}.")] for block in blocks}
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder)]
        self.fingerprint = hashlib.sha256(repr((facts, str(dtype))).encode()).hexdigest()

    def bring(self, block: str) -> None:
        """Fill the block's tensors from their files; a name that is no streamed block is in memory already."""
        self._fill(self.names.get(block, []))

    def let_go(self, block: str) -> None:
        """Back to the meta device."""
        for name in self.names.get(block, []):
            _set(self.model, name, _get(self.model, name).to("meta"))
        _return_free_memory()

    def read(self, parameter: str) -> Tensor:
        """The values of one parameter, in the dtype of the model; it stays on the meta device."""
        with safe_open(self.where[parameter], framework="pt") as opened:
            return self._cast(self._stored(opened, parameter))

    def replace(self, block: str, file: Path) -> None:
        """From now on the block's tensors are those of this file, where it has them."""
        with safe_open(file, framework="pt") as opened:
            for name in set(opened.keys()) & set(self.names.get(block, [])):
                self.where[name] = file
                self.codes.discard(name)

    def fill_rest(self) -> None:
        """Bring what belongs to no block, once and for all."""
        streamed = {name for names in self.names.values() for name in names}
        self._fill([name for name in self.model.state_dict() if name in self.where and name not in streamed])

    def _fill(self, names: list[str]) -> None:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.where[name], []).append(name)
        for file, inside in by_file.items():
            with safe_open(
                file, framework="pt"
            ) as opened:  # closed after each block: its pages count as memory while open
                for name in inside:
                    _set(self.model, name, self._cast(self._stored(opened, name)))

    def _stored(self, opened: Any, name: str) -> Tensor:
        """The values in an open file, unpacked where it has them as codes or factors."""
        if self.packed is None or name not in self.codes:
            return opened.get_tensor(name)  # type: ignore[no-any-return]
        return self.packed.weight(name, self.dtype or dtype_in(read_config(self.folder)))

    def _cast(self, tensor: Tensor) -> Tensor:
        """A copy, so that nothing keeps the file open."""
        floating = tensor.is_floating_point() and self.dtype is not None
        return tensor.to(self.dtype if floating else tensor.dtype, copy=True)


def load_streamed(name: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a folder or hub name with its blocks left on disk, in evaluation mode; dtype None keeps the stored one.

    Raises ModelError as `load`, where layers have widths of their own, and where the files do not name their tensors as the modules do
    (experts stored one by one, renamed layers): such a model must be loaded whole.
    """
    import transformers

    folder = model_folder(name)
    loader = loader_of(folder)
    if loader.library == "transformers" and is_narrow(
        read_config(folder)
    ):  # a stock class would be built in its dense sizes
        raise ModelError(f"{folder}: its layers have widths of their own; load it whole (without --stream).")
    packed = packed_folder(folder) or factored_folder(folder)
    where = packed.files() if packed else {t.name: file for file in weight_files(folder) for t in check_file(file)}
    try:
        # False, not the default: that asks on the terminal whether to run the folder's code
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{folder}: config.json cannot be used: {str(error).splitlines()[0]}") from error
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if loader.library != "transformers" or architecture is None:
        raise ModelError(f"{folder}: only stock transformers models can be streamed; load it whole (without --stream).")
    if isinstance(packed, PackedFolder):  # what is built is dense
        del config.quantization_config
    with _parameters_on_meta(), quiet():
        model: nn.Module = architecture._from_config(config)
    model.eval()
    _check_names(model, folder, where)
    if isinstance(packed, FactoredFolder):
        packed.check_turned(model)
    blocks = [block.name for block in structure_of(model, include=["*"]).blocks]
    store = BlockFiles(model, folder, where, blocks, dtype, packed)
    store.fill_rest()
    model.tie_weights()  # type: ignore[operator]
    model.layerwise_store = store  # type: ignore[assignment]
    if left := [n for n, p in model.named_parameters() if p.is_meta and not _in_block(n, blocks)]:
        raise ModelError(f'{folder}: "{left[0]}" is not in the files. Load the model whole (without --stream).')
    return model


def save_streamed(model: nn.Module, folder: Path) -> dict[str, str]:
    """Write a streamed model into an existing folder, one shard per block; returns tensor name -> shard file.

    Every shard is read back and compared before the next is written. Raises SaveError.
    """
    store: BlockFiles = model.layerwise_store  # type: ignore[assignment]
    total, size = len(store.names) + 1, 0
    weight_map: dict[str, str] = {}
    streamed = {name for names in store.names.values() for name in names}
    for index, block in enumerate([None, *store.names], start=1):
        if block is not None:
            store.bring(block)
        state = model.state_dict()
        names = (
            store.names[block] if block is not None else [n for n in state if n in store.where and n not in streamed]
        )
        shard = {name: state[name].contiguous() for name in names}
        file = f"model-{index:05d}-of-{total:05d}.safetensors"
        _write_shard(folder / file, shard)
        size += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
        weight_map |= dict.fromkeys(shard, file)
        del state, shard
        if block is not None:
            store.let_go(block)
    index_file = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1), encoding="utf-8")
    for path in sorted(
        store.folder.iterdir()
    ):  # config, generation config, tokenizer: as they were; our own record is not
        if path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(
            (".safetensors.index.json", RECORD)
        ):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = dict(config)
    if isinstance(store.packed, PackedFolder):  # its weights were written dense
        del changed["quantization_config"]
    if store.dtype is not None:
        changed["dtype"] = str(store.dtype).removeprefix("torch.")
    if changed != config:
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    return weight_map


def _write_shard(path: Path, shard: dict[str, Tensor]) -> None:
    save_file(shard, path, metadata={"format": "pt"})
    check_file(path)
    with safe_open(path, framework="pt") as opened:
        for name, tensor in shard.items():
            if not torch.equal(opened.get_tensor(name).view(torch.uint8), tensor.view(torch.uint8)):
                raise SaveError(f'{path}: "{name}" reads back differently. Check the disk.')


def _check_names(model: nn.Module, folder: Path, where: Mapping[str, Path]) -> None:
    own = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in own if name not in where and name not in tied]
    unknown = [name for name in where if name not in own]
    if missing or unknown:
        which, name = ("lack", missing[0]) if missing else ("have the unknown", unknown[0])
        raise ModelError(
            f'{folder}: the files do not name their tensors as the modules do (they {which} "{name}").'
            " Load the model whole (without --stream)."
        )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made meanwhile take no memory; buffers (rotary tables) are made for real, since no file has them."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _return_free_memory() -> None:
    """Ask glibc to give freed pages back: without it, fragments of the blocks gone by add up to the whole model."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library, which keeps its own ways
        return


def _in_block(name: str, blocks: list[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _get(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found: Any = module._parameters.get(leaf, module._buffers.get(leaf))
    assert isinstance(found, Tensor)  # noqa: S101  (names come from the state dict)
    return found


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
