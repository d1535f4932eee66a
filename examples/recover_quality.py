"""Prune a language model, train it for a while beside its dense form with the zeros held, and save it.

    python examples/recover_quality.py demo your-text.txt

Needs layerwise[train]. The same as `layerwise compress` and then `layerwise recover`.
"""

import copy
import sys
import tempfile

import layerwise as lw
from layerwise.io import load_tokenizer
from layerwise.recover import Recovered, Recovery, masks_of


def main(model_name: str = "demo", text: str = "python-docs", steps: int = 60, length: int = 128) -> Recovered:
    """Returns the held-out losses before and after, and what happened between."""
    model = lw.load(model_name).float()  # a bfloat16 weight ignores small steps
    dense = copy.deepcopy(model)
    tokenizer = load_tokenizer(model_name)
    calibration = lw.text(text, tokenizer, samples=16, length=length)
    plan = lw.methods.Uniform(sparsity=0.6).plan(model)
    lw.compress(model, plan, solver=lw.solvers.Wanda(), data=calibration)

    batches = lw.text(text, tokenizer, samples=256, length=length, batch=4, seed=1)
    judged = lw.held_out(text, tokenizer, length=length, tokens=4096, batch=4)
    with tempfile.TemporaryDirectory() as work:  # a folder that stays lets a killed run go on
        result = Recovery(steps=steps, lr=1e-3).train(
            model, batches, judged, teacher=dense, keep=masks_of(model), work=work
        )
    print(
        f"held-out loss {result.before:.3f} -> {result.after:.3f} in {result.seconds:.0f} s; ended since {result.why}"
    )
    return result


if __name__ == "__main__":
    main(*sys.argv[1:3])
