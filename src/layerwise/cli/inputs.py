"""Models and data of a command: found and checked, cheapest first, then loaded with progress."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, DataError, ModelError
from .screen import Screen

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..structure import Structure
    from ..tasks import Batches

LONGEST = 2048  # default tokens in a window, where the model's own limit is not less


@dataclass(frozen=True)
class ModelChoice:
    """A model as asked for."""

    name: str
    dtype: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    remote_code: bool = False

    @cached_property
    def folder(self) -> Path:
        """Where it is; fetched from the hub first if need be. Raises ModelError."""
        from ..io import model_folder

        return model_folder(self.name, remote_code=self.remote_code)

    @cached_property
    def bytes(self) -> int:
        """Of its weight files, every header checked. Raises ModelError naming a file that is truncated or corrupt."""
        from ..io.weights import check_file, weight_files

        return sum(tensor.bytes for file in weight_files(self.folder) for tensor in check_file(file))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Raises ModelError."""
        from ..io.places import read_config

        return read_config(self.folder)

    @cached_property
    def kind(self) -> str:
        """The name of the stock class that loads it. Raises ModelError."""
        from ..io.places import loader_of

        return loader_of(self.folder, remote_code=self.remote_code).class_name

    @property
    def sees(self) -> bool:
        """Whether it takes images: an image classifier."""
        return self.kind == "AutoModelForImageClassification"

    def check_perplexity(self) -> None:
        """Raise ModelError unless it is a causal language model, alone or behind images."""
        if self.kind not in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
            raise ModelError(
                f'model "{self.name}" is of {self.kind}, and perplexity is of causal language models. Measure it with its own'
                " task in Python."
            )

    def length(self, asked: int | None) -> int:
        """Tokens in a window: as asked, else the model's longest, at most 2048. Raises ConfigError beyond the model's longest."""
        from ..evaluate.logits import context_of

        text = self.config.get("text_config")
        limit = context_of(SimpleNamespace(config=SimpleNamespace(**(text or self.config))))  # type: ignore[arg-type]
        if asked is not None and limit is not None and asked > limit:
            raise ConfigError(f"--length {asked}: the model's longest input is {limit} tokens. Give at most that.")
        return asked if asked is not None else min(LONGEST, limit or LONGEST)

    def load(self, screen: Screen, *, stream: bool = False, device: "torch.device | None" = None) -> "nn.Module":
        """The model, every weight finite (where it is in memory). Raises ModelError.

        device: it goes there whole if that leaves half of a GPU's free memory for the work; else it stays, and blocks go in turn.
        """
        from ..io import check_finite, load, load_streamed, needed_bytes
        from .settings import dtype_of

        dtype_of(self.dtype)

        with screen.task(f"Loading {self.name}"):
            if stream:
                return load_streamed(self.name, dtype=dtype_of(self.dtype))
            model = load(self.name, dtype=self.dtype, remote_code=self.remote_code)
            check_finite(model)
            if device is not None and device.type == "cuda" and 2 * needed_bytes(model) < _free(device):
                model.to(device)
        return model

    def structure(self, model: "nn.Module") -> "Structure":
        """Its layers, as chosen by the globs. Raises SelectionError."""
        from ..structure import structure_of

        found = structure_of(model, self.include, self.exclude)
        if not found.layers:
            raise ConfigError(f'model "{self.name}": no layers are left to compress. Loosen --include or --exclude.')
        return found


@dataclass(frozen=True)
class DataChoice:
    """Text as asked for, of which windows are drawn (calibration) or read in order (evaluation)."""

    source: str | None = None
    samples: int | None = 128  # None: of images all
    length: int | None = None
    batch: int | None = None  # None: 1 window of text, 32 images
    seed: int = 0
    bos: bool = False  # in front of every window

    def where(self, model: ModelChoice) -> str:
        """The source: as asked, or python-docs for the demo model. Raises DataError if there is none."""
        if self.source is None and model.sees:
            raise DataError(
                "calibration data is needed: give --data FOLDER of images, an .npz with images and labels, or digits."
            )
        if self.source is None and model.name != "demo":
            raise DataError(
                "calibration data is needed: give --data FILE, such as a .txt or .jsonl of text like the model will see,"
                " or --data python-docs."
            )
        source = self.source or "python-docs"
        known = source in ("python-docs", "digits") or source.startswith("hub:")
        if not known and not Path(source).exists():  # before anything slow
            raise DataError(
                f"{source}: no such data file. Give a .txt, .jsonl or .parquet file, python-docs, or hub:NAME."
            )
        return source

    def draw(self, model: ModelChoice, screen: Screen, seed: int | None = None) -> "Batches":
        """Calibration windows. Raises DataError, ConfigError."""
        from ..io import load_tokenizer
        from ..tasks import continued, text

        source = self.where(model)
        if model.sees:
            return self._pictures(source, model, screen, "calibration")
        length = model.length(self.length)
        tokenizer = load_tokenizer(model.name, remote_code=model.remote_code)
        seed = self.seed if seed is None else seed
        with screen.task(f"Reading {source}"):
            drawn = text(
                source,
                tokenizer,
                samples=self.samples or 128,
                length=length,
                batch=self.batch or 1,
                seed=seed,
                bos=self.bos,
            )
        drawn = _fitting(drawn, model)
        return continued(drawn) if model.kind == "AutoModelForSeq2SeqLM" else drawn

    def read(self, model: ModelChoice, screen: Screen, tokens: int | None = None, *, tail: bool = False) -> "Batches":
        """Held-out windows in order, the first `tokens` of the text. Raises DataError, ConfigError."""
        from ..io import load_tokenizer
        from ..tasks import held_out

        source = self.where(model)
        if model.sees:
            return self._pictures(source, model, screen, "held-out")
        length = model.length(self.length)
        tokenizer = load_tokenizer(model.name, remote_code=model.remote_code)
        with screen.task(f"Reading {source}"):
            found = held_out(
                source, tokenizer, length=length, tokens=tokens, batch=self.batch or 1, bos=self.bos, tail=tail
            )
        return _fitting(found, model)

    def _pictures(
        self, source: str, model: ModelChoice, screen: Screen, split: Literal["calibration", "held-out"]
    ) -> "Batches":
        """Images, prepared by the model's own processor where its folder has one. All of them for evaluation."""
        from ..io import load_image_processor
        from ..tasks import images

        if self.length is not None:
            raise ConfigError("--length: not used, since images have no length in tokens. Leave it out.")

        processor = load_image_processor(model.name, remote_code=model.remote_code)
        samples = self.samples if split == "calibration" else None
        with screen.task(f"Reading {source}"):
            return images(
                source, processor=processor, samples=samples, seed=self.seed, batch=self.batch or 32, split=split
            )


def _fitting(data: "Batches", model: ModelChoice) -> "Batches":
    """The same data, if its token ids fit the vocabulary that config.json states: known before the weights are read."""
    from ..tasks import check_vocabulary

    words = (model.config.get("text_config") or model.config).get("vocab_size")
    if isinstance(words, int):
        check_vocabulary(data, words)
    return data


def _free(device: "torch.device") -> int:
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def protocol_line(data: "Batches") -> str:
    """Where numbers come from, in one line for people."""
    facts = data.protocol
    what = f"{facts['shape']} images" if "shape" in facts else f"{facts.get('length')} tokens"
    parts = [
        f"{facts.get('source')} ({facts['split']})" if "split" in facts else f"{facts.get('source')}",
        f"{facts.get('samples')} × {what}",
        *([f"seed {facts['seed']}"] if "seed" in facts else []),
        *(["BOS in every window"] if facts.get("bos") == "every window" else []),
        f"hash {data.hash}",
    ]
    return ", ".join(parts)


def environment_line(protocol: Mapping[str, object]) -> str:
    """What moves a number in the last digits: dtype, device, versions, the convention of perplexity."""
    words = [f"{protocol['dtype']} on {protocol['device']}"]
    words += [f"{name} {protocol[name]}" for name in ("torch", "transformers", "convention") if name in protocol]
    return ", ".join(words)


def hash_line(protocol: Mapping[str, object]) -> str:
    """Which weights and which tokenizer, in one line for people."""
    names = {"model": "model", "dense_model": "dense", "tokenizer": "tokenizer"}
    return ", ".join(f"{word} {protocol[key]}" for key, word in names.items() if key in protocol)
