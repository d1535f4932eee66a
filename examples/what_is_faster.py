"""What zeros buy in time on this machine: prune the demo model, let every layer take its fastest form, and see what was decided.

    python examples/what_is_faster.py

The demo model is small: at 90 % single tokens may get a little faster, prompts do not. The report says so; nothing is taken on trust.
"""

import torch
from torch import nn

import layerwise as lw
from layerwise.runtime import SpeedReport


def main(
    sparsity: float = 0.9, seconds: float = 0.1, lengths: tuple[int, ...] = (256, 1)
) -> tuple[nn.Module, nn.Module, SpeedReport]:
    """Returns the pruned model, the same in its fastest form for the last of the lengths, and the report."""
    model = lw.load("demo", dtype="float32")
    lw.compress(model, lw.methods.Uniform(sparsity=sparsity).plan(model), solver=lw.solvers.Magnitude())
    for length in lengths:  # a prompt, and a step of decoding
        fast, report = lw.fastest(model, batch=1, length=length, seconds=seconds)
        print(f"{length} tokens at once: {report.summary()}")
    print(report)
    ids = torch.tensor([lw.load_tokenizer("demo").encode("import os\n")])
    same = torch.equal(*(one.generate(ids, max_new_tokens=16, do_sample=False) for one in (model, fast)))
    print(f"they write the same: {same}")
    return model, fast, report


if __name__ == "__main__":
    main()
