"""layerwise beside llm-compressor: time, memory and quality of GPTQ in 4 bits, same model, tokens and groups, in one run.

    python benchmarks/peers_gptq.py --bed FOLDER --peer-python PEER/bin/python --work /tmp/peers

The protocol is that of `peers_pruning.py`. Both sides round to symmetric groups of 64 with a scale each, damping 1 %, ranges
not searched, the order of columns at each side's default; what is judged are the weights that the codes stand for.
"""

from peers_pruning import Comparison, main

GPTQ = Comparison(
    title="GPTQ beside llm-compressor",
    what="4 bits in symmetric groups of 64 for the matrices in the blocks",
    methods="gptq-4g64",
    sides="llm-compressor,layerwise",
    out="peers_gptq.md",
)

if __name__ == "__main__":
    main(GPTQ, __doc__)
