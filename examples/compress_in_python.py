"""The whole job from Python, offline: score, allocate, plan, compress, evaluate, save, load again.

    python examples/compress_in_python.py OUT [MODEL [DATA]]

OUT is a new folder. MODEL is a folder, a hub name or `demo` (the model inside the package); DATA is a text file or
`python-docs` (the standard library of this Python; its held-out modules are for evaluation alone).
"""

import sys
from pathlib import Path

import layerwise as lw


def main(out: str, model: str = "demo", data: str = "python-docs", length: int = 256) -> lw.Evaluation:
    """Prune 60 % of the weights inside the blocks by OWL and SparseGPT; returns what it cost."""
    network, dense = lw.load(model), lw.load(model)  # two copies: one is pruned in place, one is what we compare with
    tokenizer = lw.load_tokenizer(model)
    calibration = lw.text(data, tokenizer, samples=16, length=length)
    held_out = lw.held_out(data, tokenizer, length=length, tokens=8 * length)

    plan = lw.methods.OWL(sparsity=0.6).plan(network, calibration)
    result = lw.compress(network, plan, solver=lw.solvers.SparseGPT(), data=calibration)
    print(f"{result.zeros} zeros, {result.sparsity:.4%} of the pruned layers, {result.seconds['total']:.1f} s")
    for note in result.notes:  # anything unusual: a raised damping, an expert without tokens
        print("note:", note)

    cost = lw.evaluate(network, held_out, against=dense)
    print(f"perplexity {cost.dense_perplexity:.2f} -> {cost.perplexity:.2f} over {cost.tokens} tokens")
    print(f"KL divergence from the dense model {cost.kl:.3f} nats, same top-1 token {cost.top1:.1%}")

    saved = lw.save(network, out, tokenizer=tokenizer, plan=plan, result=result.to_dict())
    print("\n".join(saved.lines()))
    again = lw.evaluate(lw.load(out), held_out)
    print(f"loaded back from {Path(out).name}: perplexity {again.perplexity:.2f}")
    return cost


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
