"""SmolLM2 fine-tuned until its weights have left the 4-bit grid that they were stored on, so that quantisers can be judged on them.

    python benchmarks/tuned.py --bed FOLDER --work /tmp/tuned

AdamW, every parameter, on windows of the Wikipedia text of the bed, which no other benchmark looks at. Prints how far the weights are from
a 4-bit grid with groups of 32 before and after: the error of rounding to it, as a share of the weights' size. `bed.py` runs it once for the
model `smollm2-tuned`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerwise.solvers.grids import Grid, fit, steps_of
from layerwise.tasks import text

STEPS, BATCH, LENGTH, RATE, SEED = 100, 4, 256, 1e-3, 0


def main() -> None:
    from bed import smollm2

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bed", type=Path, default=os.environ.get("LAYERWISE_BED"), required="LAYERWISE_BED" not in os.environ
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = smollm2(options.bed, options.work)
    folder = tuned(source, options.bed, options.work)
    for name in (source, folder):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        print(f"{name.name}: {off_grid(model):.2%} of the weights' size from a 4-bit grid with groups of 32")


def tuned(source: Path, bed: Path, work: Path) -> Path:
    """Train once into `work/smollm2-tuned`: a Hugging Face folder in float32."""
    folder, partial = work / "smollm2-tuned", work / "smollm2-tuned.partial"
    if folder.is_dir():
        return folder
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    windows = text(bed / "text/wikipedia-calibration.txt", tokenizer, samples=STEPS * BATCH, length=LENGTH, seed=SEED)
    train(model, torch.cat([batch["input_ids"] for batch in windows]).to(device).split(BATCH))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def train(model: nn.Module, batches: tuple[Tensor, ...]) -> None:
    """A step for each batch: the rate rises over the first tenth and falls to nothing by a cosine."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=len(batches), pct_start=0.1)
    for step, ids in enumerate(batches):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"tuning: step {step + 1} of {len(batches)}, loss {float(loss):.3f}", file=sys.stderr, flush=True)
    model.eval()


@torch.no_grad()
def off_grid(model: nn.Module) -> float:
    """Root mean square error of the nearest 4-bit grid with groups of 32 over that of zero, all linears of the blocks."""
    error = size = 0.0
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.ndim == 2:
            groups = weight.detach().reshape(-1, 32)
            grid = Grid(4, shift=True, scale_dtype=torch.float32)
            scale, zero = fit(groups, grid)
            near = (steps_of(groups, scale, zero, grid) - zero[:, None]) * scale[:, None]
            error += float((groups - near).square().sum())
            size += float(groups.square().sum())
    return (error / size) ** 0.5


if __name__ == "__main__":
    main()
