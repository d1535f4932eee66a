"""Train the language model that the package carries, from the running interpreter's standard library.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \\
        python scripts/train_demo_model.py --compile --out src/layerwise/demo_model

Text: every document of `python-docs` except the held-out modules, and half of the library's tests in each epoch
(never those of a held-out module). Tokenizer: byte-level BPE of 4096. Muon for the matrices of the blocks, AdamW for
the rest, learning rate falling linearly to zero over the given tokens. Writes model, tokenizer and `training.json` with
the held-out perplexity and bits per byte beside xz.

On a CPU three things make it three times as fast (4,800 to 13,900 tokens/s on two cores): the allocator keeps large
buffers instead of returning them to the system (the variables above), small micro-batches stay in the cache, and
`--compile` fuses the plain attention, which then beats the fused kernel in bfloat16.
"""

import argparse
import json
import lzma
import math
import platform
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerwise.tasks.python_docs import HELD_OUT, python_docs

VOCABULARY, LENGTH = 4096, 512
BATCH, MICRO = 16, 4  # windows per step, and per forward pass
END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=32e6, help="how many to train on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    library, tests = [text for _, text in python_docs("calibration")], library_tests()
    held_out = [text for _, text in python_docs("held-out")]
    tokenizer = train_tokenizer(library)
    encode = lambda texts: [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(texts)]  # noqa: E731
    print(f"{len(library)} documents, {len(tests)} tests, {len(held_out)} held out")
    library_ids, test_ids, held_out_ids = encode(library), encode(tests), encode(held_out)
    tokens = [sum(map(len, ids)) for ids in (library_ids, test_ids, held_out_ids)]
    print("tokens: library {}, tests {}, held out {}".format(*tokens), flush=True)

    model = build_model(options.seed).to(options.device)
    log = train(model, library_ids, test_ids, held_out_ids, options, tokenizer)
    report = {
        "python": platform.python_version(),
        "held_out_modules": sorted(HELD_OUT),
        "documents": len(library),
        "tokens": {"library": tokens[0], "tests": tokens[1], "held_out": tokens[2], "seen": log[-1]["tokens"]},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "minutes": log[-1]["minute"],
        "torch": torch.__version__,
        "held_out": measure_saved(options.out, held_out_ids, held_out, library),
        "log": log,
    }
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["held_out"], indent=1))


def library_tests() -> list[str]:
    """The standard library's tests, without those that name a held-out module in their path."""
    root = Path(sysconfig.get_path("stdlib")) / "test"
    paths = [path for path in sorted(root.rglob("*.py")) if path.stat().st_size < 300_000]
    paths = [path for path in paths if not any(name in path.relative_to(root).as_posix() for name in HELD_OUT)]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    return model


def windows(library: list[list[int]], tests: list[list[int]], draw: random.Random) -> torch.Tensor:
    """One epoch: whole documents in random order, joined, cut into windows, shuffled. (windows, LENGTH)."""
    documents = library + draw.sample(tests, len(tests) // 2)
    draw.shuffle(documents)
    stream = [token for document in documents for token in document][draw.randrange(LENGTH) :]
    cut = [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH, LENGTH)]
    draw.shuffle(cut)
    return torch.tensor(cut)


def train(model, library, tests, held_out, options, tokenizer) -> list[dict]:
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimisers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    draw, log, step, seen, saved = random.Random(options.seed), [], 0, 0, 0.0
    recent: list[float] = []
    started, step_of = time.monotonic(), torch.compile(loss_of) if options.compile else loss_of
    while seen < options.tokens:
        for batch in windows(library, tests, draw).split(BATCH):
            if seen >= options.tokens:
                break
            factor = min(1.0, (step + 1) / 100) * (1 - seen / options.tokens)
            for optimiser, rate in zip(optimisers, rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate * factor
            recent.append(train_step(model, batch.to(options.device), optimisers, step_of))
            step, seen = step + 1, seen + batch.numel()
            if time.monotonic() - saved > 300:
                saved = time.monotonic()
                log.append(entry(model, step, seen, recent, held_out, started))
                print(json.dumps(log[-1]), flush=True)
                recent.clear()
                save(model, tokenizer, options.out)
    log.append(entry(model, step, seen, recent, held_out, started, tokens=10**9))
    save(model, tokenizer, options.out)
    return log


def loss_of(model, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(input_ids=windows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


def train_step(model, batch, optimisers, step_of) -> float:
    model.train()
    total = 0.0
    for some in batch.split(MICRO):
        loss = step_of(model, some) * (len(some) / len(batch))
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return total


def entry(model, step, seen, recent, held_out, started, tokens=16_384) -> dict:
    loss = held_out_loss(model, held_out, tokens)[0]
    return {
        "minute": round((time.monotonic() - started) / 60, 1),
        "step": step,
        "tokens": seen,
        "training_loss": round(sum(recent) / len(recent), 4),
        "held_out_loss": round(loss, 4),
    }


@torch.no_grad()
def held_out_loss(model, held_out, tokens) -> tuple[float, int]:
    """(mean loss, scored tokens) over non-overlapping windows of the joined held-out text; tails dropped."""
    stream = torch.tensor([token for document in held_out for token in document][:tokens])
    cut = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH).to(model.device)
    model.eval()
    total = sum(cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:], reduction="sum").item() for w in cut)
    scored = cut.shape[0] * (LENGTH - 1)
    return total / scored, scored


def measure_saved(out: Path, held_out_ids, held_out, library) -> dict:
    """Held-out figures of the saved bf16 file, computed in float32, and what xz makes of the same text."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    loss, scored = held_out_loss(model, held_out_ids, 10**9)
    text = "".join(held_out).encode()
    before = "".join(library).encode()
    bytes_per_token = len(text) / sum(map(len, held_out_ids))
    # a preset as large as all the text: xz may then use the whole library as its dictionary
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    pack = lambda data: len(lzma.compress(data, filters=filters))  # noqa: E731
    return {
        "perplexity_per_token": round(math.exp(loss), 3),
        "loss": round(loss, 4),
        "scored_tokens": scored,
        "window": LENGTH,
        "bytes_per_token": round(bytes_per_token, 3),
        "bits_per_byte": round(loss / math.log(2) / bytes_per_token, 4),
        "xz_bits_per_byte": round(8 * pack(text) / len(text), 4),
        "xz_bits_per_byte_after_library": round(8 * (pack(before + text) - pack(before)) / len(text), 4),
    }


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """bfloat16 weights and tokenizer, as stock classes load them; the model in training keeps float32."""
    stored = build_model(0).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config.eos_token_id = 0
    stored.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=LENGTH
    ).save_pretrained(out)


if __name__ == "__main__":
    main()
