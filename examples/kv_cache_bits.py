"""Bits of the KV cache by attention: search, look at the front, make the cache, generate with it.

    python examples/kv_cache_bits.py [BITS [MODEL [DATA]]]

BITS is the most true bits of a cached number; MODEL a folder, a hub name or `demo`; DATA a text file or `python-docs`. Needs
`pip install 'layerwise[search]'`.
"""

import sys

import layerwise as lw


def main(
    bits: float = 4.0, model: str = "demo", data: str = "python-docs", trials: int = 60, length: int = 256
) -> lw.methods.KVSearch:
    """Search, and generate with the cache that came of it."""
    network, tokenizer = lw.load(model), lw.load_tokenizer(model)
    calibration = lw.text(data, tokenizer, samples=32, length=length, batch=4)  # the last quarter is for the verdict

    tuner = lw.methods.KVTuner(bits=bits, trials=trials, judged=8 * length)
    search = tuner.search(network, calibration)  # storage="search.journal" keeps it: a killed search goes on
    for one in search.front:  # nothing that was tried has fewer bits and less loss
        print(f"{one.word:24} {one.true:6.3f} true bits   KL {one.loss:.4g}")
    print(search.verdict)

    cache = lw.QuantizedKVCache.from_plan(search.plan, network.config)
    prompt = tokenizer("def read_lines(path):", return_tensors="pt").to(network.device)
    written = network.generate(**prompt, past_key_values=cache, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(written[0]))
    return search


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0, *sys.argv[2:])
