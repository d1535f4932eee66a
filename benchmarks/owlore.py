"""Fine-tuning from one domain of text to another: held-out loss, memory and time of full, LoRA, GaLore, LISA and OwLore.

    python benchmarks/owlore.py --bed FOLDER --work /tmp/owlore                    # the demo model, from Python to Wikipedia

LoRA needs peft. The learning rate of every method is the best in steps of 3, by the loss on text that neither trains nor judges, with a
seed of its own; then every method is trained and judged with `--seeds` seeds. The controls of OwLore (the same, decreasing and reversed
probabilities) have its learning rate. Every run is a line of the `.jsonl`; killed, it goes on. See README.md for the protocol.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer

import layerwise as lw
from bed import Subject, add_arguments, perplexity, subjects
from layerwise.randomness import generator_for
from layerwise.recover import LayerSampling, LowRank, LowRankAdam, parameter_groups
from lines import Lines, Row
from measuring import machine
from training_memory import Memory, expected

HERE = Path(__file__).parent
COLUMNS = (
    "method", "learning rate", "held-out loss", "weights MB", "gradients MB", "state MB", "saved MB", "sum MB", "by arithmetic",
    "CPU s a step",
)  # fmt: skip
TUNING = 1000  # the seed of the runs that choose learning rates


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. rate: the unit of its learning rate. like: the method whose learning rate it takes."""

    rate: float
    blocks: int = 0  # trained at a time; 0: all
    low_rank: bool = False
    plan: dict[str, Any] = field(default_factory=dict)  # settings of OwLore
    always: str = "*"
    like: str = ""


OWLORE = {"rate": 2e-3, "blocks": 2, "low_rank": True}
RECIPES = {
    "full": Recipe(1e-3),
    "lora": Recipe(3e-3),
    "galore": Recipe(2e-3, low_rank=True),
    "lisa": Recipe(2e-3, blocks=2, plan={"score": "uniform"}),
    "owlore": Recipe(**OWLORE, plan={"score": "outliers"}),
    "owlore, even": Recipe(**OWLORE, plan={"score": "uniform"}, like="owlore"),
    "owlore, decreasing": Recipe(**OWLORE, plan={"score": "decrease"}, like="owlore"),
    "owlore, reversed": Recipe(**OWLORE, plan={"score": "reverse"}, like="owlore"),
    "owlore, embeddings frozen": Recipe(**OWLORE, plan={"score": "outliers"}, always=""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, models="demo")
    parser.add_argument("--methods", default=";".join(RECIPES), help="separated by semicolons (default: all)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="0, 1, ...: order of text, draws of blocks, start of adapters"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of the text that is judged, and of that which chooses rates"
    )
    parser.add_argument(
        "--rank", type=int, default=32, help="of GaLore and OwLore; LoRA has half, which has as many numbers"
    )
    parser.add_argument(
        "--period", type=int, default=6, help="steps between draws of blocks, and between projectors of GaLore"
    )
    parser.add_argument("--factor", type=float, default=5.0, help="an outlier exceeds so many times the mean")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results/owlore.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    results, named = Lines(options.out.with_suffix(".jsonl")), list(subjects(options))
    methods = [name.strip() for name in options.methods.split(";")]
    for subject in named:
        texts = Texts(subject, options)
        rates = {name: chosen(subject, texts, name, results, options) for name in methods if not RECIPES[name].like}
        for seed in range(options.seeds):
            for name in methods:
                rate = rates[RECIPES[name].like or name]
                kept(results, subject, texts, name, rate, seed, "judged", options)
    text = "\n".join(report(results, named, methods, options))
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


class Texts:
    """Token ids of the new domain: demo reads Wikipedia, the others the Python library. Three parts that share no text."""

    def __init__(self, subject: Subject, options: argparse.Namespace) -> None:
        path, windows = options.work / f"{subject.name}.txt", options.tokens // options.length
        if subject.name == "demo":
            whole = (subject.bed / "text/wikipedia-calibration.txt").read_text(encoding="utf-8")
            path.write_text(whole, encoding="utf-8")
            ids = torch.cat([one["input_ids"] for one in lw.held_out(path, subject.tokenizer, length=options.length)])
            self.train, self.tune, self.judge = ids[: -2 * windows], ids[-2 * windows : -windows], ids[-windows:]
        else:
            samples = options.steps * options.batch + windows
            found = lw.text("python-docs", subject.tokenizer, samples=samples, length=options.length)
            ids = torch.cat([one["input_ids"] for one in found])
            judged = lw.held_out("python-docs", subject.tokenizer, length=options.length, tokens=options.tokens)
            self.train, self.tune = ids[windows:], ids[:windows]
            self.judge = torch.cat([one["input_ids"] for one in judged])
        self.calibration = lw.Batches(tuple({"input_ids": one[None]} for one in self.train[:64]), {})

    def batches(self, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
        """In an order of the seed's; what is read again is in another order."""
        draw = generator_for(seed, "owlore/order")
        left: Tensor = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(len(self.train), generator=draw)])
            yield self.train[left[:batch]]
            left = left[batch:]


def chosen(subject: Subject, texts: Texts, name: str, results: Lines, options: argparse.Namespace) -> float:
    """The learning rate of least loss on the text for that; steps go on by 3 while the best is at an end."""
    losses = {}
    rates = [RECIPES[name].rate * times for times in (1 / 3, 1, 3)]
    while rates:
        for rate in rates:
            losses[rate] = kept(results, subject, texts, name, rate, TUNING, "tuned", options)["loss"]
        best, low, high = min(losses, key=losses.__getitem__), min(losses), max(losses)
        rates = [] if low < best < high or len(losses) > 6 else [best / 3 if best == low else best * 3]
    return best


def kept(
    results: Lines,
    subject: Subject,
    texts: Texts,
    name: str,
    rate: float,
    seed: int,
    part: str,
    options: argparse.Namespace,
) -> Row:
    key = key_of(subject, name, rate, seed, part, options)
    if key not in results:
        results.add(key, row := trained(subject, texts, name, rate, seed, part, options))
        print(
            f"{name}, {rate:g}, seed {seed}: loss {row['loss']:.4f}, {row['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return results[key]


def key_of(subject: Subject, name: str, rate: float, seed: int, part: str, options: argparse.Namespace) -> Row:
    names = ("steps", "batch", "length", "tokens", "rank", "period", "factor")
    return {"model": subject.name, "method": name, "rate": rate, "seed": seed, "part": part} | {
        one: getattr(options, one) for one in names
    }


# -- training


def trained(
    subject: Subject, texts: Texts, name: str, rate: float, seed: int, part: str, options: argparse.Namespace
) -> Row:
    """Loss afterwards, and the most that tensors took: AdamW's or LowRankAdam's, warm-up of 5 steps, then linear to 0, clipped at 1."""
    model = subject.load()
    model, optimizer, at = prepared(model, texts, name, rate, seed, options)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 5, options.steps)
    memory, seconds, losses = Memory(model, optimizer), 0.0, []
    model.train()
    for step, ids in enumerate(texts.batches(options.steps, options.batch, seed)):
        at(step)
        look = step % options.period == options.period - 1 and part == "judged"  # outside the clock
        started = time.process_time()
        with memory.saved(look):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += 0.0 if look else time.process_time() - started
        memory.look()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    windows = list(texts.tune if part == "tuned" else texts.judge)
    judged = torch.tensor(perplexity(model, windows)).log().item()
    looks = options.steps // options.period if part == "judged" else 0
    return {
        "rate": rate,
        "loss": judged,
        "train_loss": statistics.fmean(losses[-10:]),
        "seconds": seconds,
        "per_step": seconds / (options.steps - looks),
        **memory.most,
    }


def prepared(
    model: nn.Module, texts: Texts, name: str, rate: float, seed: int, options: argparse.Namespace
) -> tuple[nn.Module, Optimizer, Callable[[int], None]]:
    """The model, its optimiser, and what is called before each step."""
    recipe, low_rank = RECIPES[name], LowRank(options.rank, options.period)
    if name == "lora":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(
                model, LoraConfig(r=options.rank // 2, lora_alpha=options.rank // 2, target_modules="all-linear")
            )
    if not recipe.blocks:
        groups = parameter_groups(model, rate, low_rank=low_rank if recipe.low_rank else None)
        return model, LowRankAdam(groups) if recipe.low_rank else torch.optim.AdamW(groups), lambda step: None
    owlore = lw.methods.OwLore(
        **recipe.plan, outlier_factor=options.factor, blocks=recipe.blocks, period=options.period,
        rank=options.rank if recipe.low_rank else 0, always=recipe.always, seed=seed,
    )  # fmt: skip
    sampling: LayerSampling = owlore.sampling(model, owlore.plan(model, texts.calibration))
    groups = sampling.groups(rate)
    optimizer = LowRankAdam(groups) if recipe.low_rank else torch.optim.AdamW(groups)
    sampling.watch(optimizer)
    return model, optimizer, sampling.at


# -- the table


def report(results: Lines, named: list[Subject], methods: list[str], options: argparse.Namespace) -> Iterator[str]:
    yield "# Fine-tuning to another domain, a few blocks at a time"
    yield ""
    yield f"Machine: {machine()}; {options.threads} thread(s). layerwise {lw.__version__}, torch {torch.__version__}."
    yield (
        f"Protocol: {options.steps} steps of {options.batch} x {options.length} tokens in float32, 5 steps of warm-up, then linear to 0,"
        f" clipped at 1; rank {options.rank} (LoRA {options.rank // 2}), 2 blocks at a time, others every {options.period} steps;"
        f" projectors of GaLore as often; outliers above {options.factor:g} times the mean. Learning rates: the best in steps"
        f" of 3, on other text. Held-out loss: mean ± standard deviation over {options.seeds} seeds. MB = 1e6 bytes, the most"
        " at any step by torch's accounting; `by arithmetic` is that of gradients and state, once every block was there. CPU"
        " seconds: median over seeds."
    )
    for subject in named:
        model = subject.load()
        windows = list(Texts(subject, options).judge)
        before = torch.tensor(perplexity(model.eval(), windows)).log().item()
        yield from ["", f"## {subject.name}, loss before {before:.4f}", ""]
        yield f"| {' | '.join(COLUMNS)} |"
        yield f"|---|{'--:|' * (len(COLUMNS) - 1)}"
        for name in methods:
            yield _line(results, subject, model, name, options)


def tuned(results: Lines, subject: Subject, name: str, options: argparse.Namespace) -> float:
    """The learning rate that was chosen."""
    wanted = key_of(subject, name, 0.0, TUNING, "tuned", options)
    del wanted["rate"]
    return float(min(results.of(**wanted), key=lambda row: row["loss"])["rate"])


def _line(results: Lines, subject: Subject, model: nn.Module, name: str, options: argparse.Namespace) -> str:
    recipe = RECIPES[name]
    rate = tuned(results, subject, recipe.like or name, options)
    rows = [results[key_of(subject, name, rate, seed, "judged", options)] for seed in range(options.seeds)]
    losses = [row["loss"] for row in rows]
    deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    parts = [max(row[part] for row in rows) for part in ("weights", "gradients", "state", "saved")]
    known = expected(model, recipe.blocks, options.rank if recipe.low_rank else 0, recipe.always != "")
    cells = [f"{value / 1e6:.1f}" for value in (*parts, sum(parts))]
    cells.append("–" if name == "lora" else f"{sum(known) / 1e6:.1f}")
    seconds = statistics.median(row["per_step"] for row in rows)
    return f"| {name} | {rate:g} | {statistics.fmean(losses):.4f}{deviation} | {' | '.join(cells)} | {seconds:.3f} |"


if __name__ == "__main__":
    main()
