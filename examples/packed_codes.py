"""Codes of your own, saved so that stock tools load them: the big matrices in 4 bits, attention in 8.

    pip install 'layerwise[quant]'
    python examples/packed_codes.py [FOLDER]

A quantizing solver gives such codes as `result.codes`. Here they are made by hand, to show what they are: whole numbers, a scale for
every group of inputs, and the code that means zero.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise.solvers.codes import Codes


def rounded(weight: Tensor, bits: int, group: int) -> Codes:
    """Round to nearest, symmetric: code 2^(bits - 1) is zero."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // group, group)
    middle = 2 ** (bits - 1)
    scale = (groups.abs().amax(-1) / (middle - 1)).to(weight.dtype).float()  # as it will be stored
    values = (groups / scale.unsqueeze(-1)).round().clamp(-middle, middle - 1) + middle
    zero = torch.full_like(scale, middle)
    return Codes(values.to(torch.uint8).flatten(1), scale, zero, bits, group, symmetric=True, scale_dtype=weight.dtype)


def main(folder: Path) -> None:
    model = lw.load("demo")
    codes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            codes[name] = rounded(module.weight.detach(), bits=8 if "attn" in name else 4, group=64)
            module.weight.data = codes[name].weight().to(module.weight.dtype)  # the model has what the codes give
    saved = lw.save(model, folder, tokenizer=lw.load_tokenizer("demo"), codes=codes)
    print(*saved.lines(), sep="\n")

    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        print(f"difference of logits: {(stock(ids).logits - model(ids).logits).abs().max():g}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "packed-out"))
