"""A model in factors: every linear becomes block-diagonal x sparse 2:4 core x block-diagonal (ARMOR), within a budget of bits.

    python examples/armor_factors.py [FOLDER]

The same from the command line:
    layerwise compress demo --solver armor --pattern 2:4 --bits 10.5 --samples 16 --length 256 -o FOLDER
"""

import sys
from pathlib import Path

import layerwise as lw


def main(folder: Path) -> lw.Evaluation:
    model, tokenizer = lw.load("demo"), lw.load_tokenizer("demo")
    data = lw.text("python-docs", tokenizer, samples=8, length=256)

    # the plan: for every layer the side of its diagonal blocks, such that all together take 10.5 bits per weight at most
    plan = lw.methods.Armor(pattern="2:4", bits=10.5).plan(model)
    result = lw.compress(model, plan, solver=lw.solvers.ARMOR(iterations=10), data=data)
    print(f"{len(result.factors)} layers in {result.bits:.2f} bits per weight; the whole model {result.model_bits:.2f}")

    saved = lw.save(model, folder, tokenizer=tokenizer, plan=plan, factors=result.factors)
    print(*saved.lines(), sep="\n")

    held_out = lw.held_out("python-docs", tokenizer, length=256, tokens=2048)
    loaded = lw.load(folder)  # its linears run in factors
    cost = lw.evaluate(loaded, held_out, against=lw.load("demo"))
    print(f"perplexity {cost.perplexity:.2f}, dense {cost.dense_perplexity:.2f}")

    stock = lw.load(folder, dense=True)  # plain linears again, for any other tool
    print(f"multiplied out: {lw.evaluate(stock, held_out).perplexity:.2f}")
    return cost


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "armor-out"))
