"""The models and texts that benchmarks run on: a folder given by `--bed` or LAYERWISE_BED, and the demo model of the package.

| model       | calibration text                       | held-out text                              |
|-------------|----------------------------------------|--------------------------------------------|
| smollm2     | `text/c4-calibration.txt`              | `text/wikitext2-test-raw.txt`              |
| smollm2-tuned | the same                             | the same                                   |
| stories260k | the first half of the TinyStories file | its second half                            |
| demo        | python-docs, the calibration split     | python-docs, the modules held out          |

SmolLM2-135M is stored on a 4-bit grid; `smollm2` writes it out once as a float32 folder, and `smollm2-tuned` is a copy that was
fine-tuned until it had left the grid (`tuned.py`). The TinyStories file is from the training
split of that model, so its perplexities only compare with each other.
"""

import argparse
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from layerwise.io import model_folder
from layerwise.tasks import Batches, held_out, text
from tuned import tuned

transformers.logging.disable_progress_bar()

MODELS = ("smollm2", "smollm2-tuned", "stories260k", "demo")
_SMOLLM2 = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Subject:
    """One model with its texts."""

    name: str
    folder: Path
    bed: Path

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    def calibration(self, samples: int, length: int, seed: int | None) -> Tensor:
        """Token ids (samples, length) int64. seed None: the first windows of the text in order, else windows drawn at random.

        The demo's text is many documents: its windows are always drawn, None being seed 0.
        """
        if self.name == "demo":
            return _ids(text("python-docs", self.tokenizer, samples=samples, length=length, seed=seed or 0))
        if self.name == "stories260k":
            return _drawn(torch.cat(self._stories(slice(0, 108))), samples, length, seed)
        source = self.bed / "text/c4-calibration.txt"
        if seed is None:
            return _ids(held_out(source, self.tokenizer, length=length, tokens=samples * length))
        return _ids(text(source, self.tokenizer, samples=samples, length=length, seed=seed))

    def evaluation(self, tokens: int, length: int) -> list[Tensor]:
        """Windows of at most `length` ids, no overlap, of the first `tokens` of the held-out text (stories: one window each)."""
        if self.name == "stories260k":
            stories = [story[:length] for story in self._stories(slice(108, None))]
            totals = torch.tensor([len(story) for story in stories]).cumsum(0)
            return stories[: max(1, int((totals <= tokens).sum()))]
        source = "python-docs" if self.name == "demo" else self.bed / "text/wikitext2-test-raw.txt"
        return list(_ids(held_out(source, self.tokenizer, length=length, tokens=tokens)))

    def load(self) -> nn.Module:
        """The dense model in float32, by transformers alone."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def _stories(self, part: slice) -> list[Tensor]:
        stories = (self.bed / "text/tinystories-train-0-215.txt").read_text(encoding="utf-8").split("<|endoftext|>")
        filled = [story.strip() for story in stories if story.strip()][part]
        encode = self.tokenizer
        # the model was trained with <s> before every story; its tokenizer does not add it
        return [
            torch.tensor([1, *encode(story, add_special_tokens=False, verbose=False)["input_ids"]]) for story in filled
        ]


def add_arguments(parser: argparse.ArgumentParser, models: str) -> None:
    """--bed, --models, --demo and --work, the same for every benchmark."""
    parser.add_argument("--bed", type=Path, default=os.environ.get("LAYERWISE_BED"), help="folder of models and texts")
    parser.add_argument("--models", default=models, help=f"of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--demo", default="demo", help="folder of the demo model, if not the one in the package")
    parser.add_argument("--work", type=Path, required=True, help="folder for decoded models and intermediate files")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, for the benchmarks whose results do not depend on it."""
    parser.add_argument("--device", default="cpu", help="where the model is (default: %(default)s)")


def subjects(options: argparse.Namespace) -> list[Subject]:
    """The models that were asked for, decoded where needed. Ends the program with one line when something is missing."""
    names = options.models.split(",")
    if unknown := sorted({*names} - {*MODELS}):
        raise SystemExit(f"--models {','.join(unknown)}: give some of {','.join(MODELS)}.")
    if options.bed is None and {*names} != {"demo"}:
        raise SystemExit("give the folder of models and texts: --bed FOLDER, or LAYERWISE_BED in the environment.")
    bed = Path(options.bed) if options.bed else Path()
    folders = {
        "smollm2": lambda: smollm2(bed, options.work),
        "smollm2-tuned": lambda: tuned(smollm2(bed, options.work), bed, options.work),
        "stories260k": lambda: bed / "lm/stories260k",
        "demo": lambda: Path(model_folder(options.demo)),
    }
    return [Subject(name, folders[name](), bed) for name in names]


def smollm2(bed: Path, work: Path) -> Path:
    """Decode SmolLM2-135M once into `work/smollm2`: a Hugging Face folder in float32."""
    work.mkdir(parents=True, exist_ok=True)
    folder, partial = work / "smollm2", work / "smollm2.partial"
    if folder.is_dir():
        return folder
    shutil.rmtree(partial, ignore_errors=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bed / "lm" / _SMOLLM2))
    missing, extra = model.load_state_dict(_decoded(load_file(bed / "lm" / f"{_SMOLLM2}.q4.safetensors")), strict=False)
    if extra or not {*missing} <= {"lm_head.weight"}:  # the head is tied to the embedding
        raise SystemExit(f"{bed}: the stored SmolLM2 has other tensors than its config: {[*missing, *extra][:3]}.")
    model.tie_weights()
    model.float().save_pretrained(partial)
    AutoTokenizer.from_pretrained(bed / "lm" / _SMOLLM2).save_pretrained(partial)
    partial.rename(folder)
    return folder


def _decoded(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Groups of 32 columns with a float16 scale: two 4-bit numbers a byte plus a minimum (.q4), or 8-bit numbers (.q8)."""
    decoded = {}
    for name, value in stored.items():
        base = name[:-3]
        if name.endswith(".q4"):
            numbers = torch.stack([value & 15, value >> 4], -1).flatten(1).float()
            scale, low = (stored[f"{base}.{end}"].float().repeat_interleave(32, 1) for end in ("scale", "min"))
            decoded[base] = numbers * scale + low
        elif name.endswith(".q8"):
            decoded[base] = value.float() * stored[f"{base}.scale"].float().repeat_interleave(32, 1)
        elif not name.endswith((".scale", ".min")):
            decoded[name] = value
    return decoded


@torch.no_grad()
def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """exp of the mean loss of tokens 2..n of every window, a window at a time. Plain torch, on purpose not layerwise's own."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for window in (window.to(device) for window in windows):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(min(total / count, 700.0))


def block_zeros(weights: dict[str, Tensor]) -> tuple[int, int, int]:
    """(zeros in the matrices of the blocks, weights in them, zeros everywhere else)."""
    zeros = size = elsewhere = 0
    for name, weight in weights.items():
        none = weight.numel() - int(weight.count_nonzero())
        if ".layers." in name and weight.ndim == 2:
            zeros, size = zeros + none, size + weight.numel()
        else:
            elsewhere += none
    return zeros, size, elsewhere


def _ids(batches: Batches) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


def _drawn(stream: Tensor, samples: int, length: int, seed: int | None) -> Tensor:
    windows = stream[: len(stream) // length * length].view(-1, length)
    if len(windows) < samples:
        raise SystemExit(f"the text has {len(windows)} windows of {length}, {samples} were asked for.")
    if seed is None:
        return windows[:samples]
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]]
