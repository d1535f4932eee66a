"""Compress a language model twice: as the solver leaves it, and with every block tuned to give what the dense block gave.

    python examples/reconstruct_blocks.py demo your-text.txt

The same as `layerwise compress MODEL --reconstruct`.
"""

import sys

import layerwise as lw
from layerwise.evaluate import perplexity
from layerwise.io import load_tokenizer
from layerwise.recover import Reconstruction


def main(model_name: str = "demo", text: str = "python-docs", samples: int = 32, length: int = 128) -> list[float]:
    """Returns the held-out perplexity without and with reconstruction."""
    tokenizer = load_tokenizer(model_name)
    data = lw.text(text, tokenizer, samples=samples, length=length, batch=2)
    judged = lw.held_out(text, tokenizer, length=length, tokens=4096)
    found = []
    for tuner in (None, Reconstruction(epochs=2)):
        model = lw.load(model_name)
        plan = lw.methods.Uniform(sparsity=0.6).plan(model)
        result = lw.compress(model, plan, solver=lw.solvers.Wanda(), data=data, tuner=tuner)
        found.append(perplexity(model, judged).value)
        for block in result.tuned:
            print(f"{block.block}: error {block.before:.4f} -> {block.after:.4f} {block.note}")
    print(f"held-out perplexity {found[0]:.2f} as solved, {found[1]:.2f} with blocks tuned")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
