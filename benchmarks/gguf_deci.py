"""Does llama.cpp compute from a GGUF of widths by layer what the model computes?

    pip install 'layerwise[gguf]' llama-cpp-python && python benchmarks/gguf_deci.py

The demo model loses channels (each block another number) and a block; then it is written in F32 and F16. Both sides see the
same tokens of held-out text. The error is the largest difference of logits over the largest logit; llama.cpp computes products of F32 in
its own order, and of F16 with inputs rounded. `ids` says whether both tokenizers give the same tokens for that text.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import layerwise as lw
from layerwise.io import load_tokenizer, model_folder, save_gguf
from layerwise.shrink import drop_blocks, shrink
from layerwise.structure import coupled_groups
from measuring import machine

HERE = Path(__file__).parent
TEXT = "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    return ordered[middle]  # of 2024\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a folder, or demo")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE / "results/gguf_deci.md")
    options = parser.parse_args()
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise SystemExit(
            "gguf_deci.py needs llama-cpp-python: pip install llama-cpp-python (it builds llama.cpp)."
        ) from None
    tokenizer = load_tokenizer(options.model)
    model = narrowed(lw.load(options.model, dtype="float32"))
    ids = tokenizer(TEXT * 40)["input_ids"][: options.tokens]
    wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("F32", "F16"):
            saved = save_gguf(model, f"{folder}/{dtype}.gguf", tokenizer=model_folder(options.model), dtype=dtype)
            other = llama_cpp.Llama(str(saved.file), n_ctx=len(ids), logits_all=True, verbose=False)
            other.eval(ids)
            error = relative_error(wanted, np.array(other.scores[: len(ids)]))
            same = (
                other.tokenize(TEXT.encode(), add_bos=False) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
            )
            rows.append(f"| {dtype} | {saved.bytes:,} | {error:.2g} | {'the same' if same else 'different'} |")
            widths = f"channels {list(saved.channels)}, heads {list(saved.heads)}"
    table = ["| numbers | bytes | error of logits | ids |", "|---|---|---|---|", *rows]
    head = f"{Path(options.model).name}: {widths}; {len(ids)} tokens; llama-cpp-python {llama_cpp.__version__}; {machine()}."
    text = "\n".join(["# GGUF deci beside the model", "", head, "", *table, ""])
    print(text)
    options.out.write_text(text, encoding="utf-8")


def narrowed(model: torch.nn.Module) -> torch.nn.Module:
    """Block after block fewer channels, down to a half; the third block goes; of two key heads the second attention loses one."""
    groups = coupled_groups(model).groups
    mlps = [group for group in groups if group.kind == "channels"]
    keep = {group.name: range(group.units - index * group.units // (2 * len(mlps))) for index, group in enumerate(mlps)}
    attention = [group for group in groups if group.kind == "heads"][1]
    if attention.units > 1:
        keep[attention.name] = range(attention.units - 1)
    shrink(model, keep)
    drop_blocks(model, [mlps[2].block])
    return model


def relative_error(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference over the largest number."""
    return float(np.abs(wanted - got).max() / np.abs(wanted).max())


if __name__ == "__main__":
    main()
