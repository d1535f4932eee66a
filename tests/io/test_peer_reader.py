"""llm-compressor's environment reads what we pack. It needs an older transformers, so its python is named: LAYERWISE_PEER_PYTHON."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.io import save
from models import small_llama
from quantized import quantized

PEER = os.environ.get("LAYERWISE_PEER_PYTHON")
pytestmark = pytest.mark.skipif(PEER is None, reason="LAYERWISE_PEER_PYTHON names no python that has llmcompressor")
READ = """
import json, sys
import compressed_tensors, llmcompressor, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(3, 35)[None]).logits
save_file({"logits": logits, **{n: t.contiguous().clone() for n, t in model.state_dict().items()}}, sys.argv[2])
print(json.dumps([llmcompressor.__version__, compressed_tensors.__version__]))
"""


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("transformers", lambda name, index: ((2, 3, 4, 8)[index % 4], [16, None, 32][index % 3], True)),
        ("vllm", lambda name, index: (4, 32, False)),  # its transformers, 5.17, reads zeros
    ],
)
def test_the_same_weights_and_logits(tmp_path, target, scheme):
    model = small_llama(hidden_size=64, intermediate_size=96)
    save(model, tmp_path / "out", codes=quantized(model, scheme), target=target, verify=False)
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits
        save_file({"logits": logits}, tmp_path / "own.safetensors")
    command = [str(PEER), "-", str(tmp_path / "out"), str(tmp_path / "peer.safetensors")]
    done = subprocess.run(command, input=READ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])) == 2
    theirs = load_file(tmp_path / "peer.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(theirs["logits"], logits)
