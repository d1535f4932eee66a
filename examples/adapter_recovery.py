"""Prune a language model, train an adapter that leaves its zeros zero, and merge it.

    python examples/adapter_recovery.py demo your-text.txt

Needs layerwise[train]. The same as `layerwise recover OUT --adapter hira`.
"""

import sys

import torch

import layerwise as lw
from layerwise.evaluate import perplexity
from layerwise.io import load_tokenizer
from layerwise.recover import add_adapter, fine_tune, merge_adapter


def main(model_name: str = "demo", text: str = "python-docs", samples: int = 64, length: int = 128) -> tuple[int, int]:
    """Returns the zeros in the matrices before and after."""
    model = lw.load(model_name).float()
    tokenizer = load_tokenizer(model_name)
    data = lw.text(text, tokenizer, samples=samples, length=length, batch=4)
    judged = lw.held_out(text, tokenizer, length=length, tokens=4096)
    lw.compress(model, lw.methods.Uniform(sparsity=0.6).plan(model), solver=lw.solvers.Wanda(), data=data)
    before, zeros = perplexity(model, judged).value, _zeros(model)

    add_adapter(model, "hira", rank=16)
    trained = [one for one in model.parameters() if one.requires_grad]
    fine_tune(model, data, torch.optim.AdamW(trained, lr=5e-3))  # or any other loop or trainer
    merge_adapter(model)

    after = perplexity(model, judged).value
    print(f"{sum(one.numel() for one in trained):,} numbers trained; held-out perplexity {before:.2f} -> {after:.2f}")
    print(f"zeros in matrices: {zeros:,} before, {_zeros(model):,} after")
    return zeros, _zeros(model)


def _zeros(model: torch.nn.Module) -> int:
    return sum(one.numel() - int(one.count_nonzero()) for one in model.parameters() if one.ndim > 1)


if __name__ == "__main__":
    main(*sys.argv[1:3])
