"""transformers' QuantizedCache with quanto or HQQ: the other side of `kv_cache.py`, run by the peer environment's Python.

Takes one JSON argument: model (folder), ids (a safetensors file with prompt and window.0, window.1, ...), backend, bits, group,
residual, step, new, threads, dtype, device, quality (true: judge the windows; false: time decoding). Prints one line of JSON.
"""

import json
import sys
from functools import partial
from importlib.metadata import version

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, QuantizedCache

from kv_measuring import decoding, quality

PER_TOKEN = {"quanto": 0, "hqq": 1}  # transformers passes the axis on, and the two count differently


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    model.to(job["device"])
    data = load_file(job["ids"], device=job["device"])
    axis = PER_TOKEN[job["backend"]]
    make = partial(
        QuantizedCache, backend=job["backend"], config=model.config, nbits=job["bits"], axis_key=axis, axis_value=axis,
        q_group_size=job["group"], residual_length=job["residual"],
    )  # fmt: skip
    if job["quality"]:
        row = quality(model, [data[f"window.{index}"] for index in range(len(data) - 1)], make, job["step"])
    else:
        row = decoding(model, data["prompt"], make, job["new"])
    package = {"quanto": "optimum-quanto", "hqq": "hqq"}[job["backend"]]
    print(json.dumps(row | {"version": version(package)}))


if __name__ == "__main__":
    main()
