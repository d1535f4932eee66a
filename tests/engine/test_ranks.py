"""Two processes give one process's result: the same masks, weights within float tolerance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerwise.engine import Ranks
from layerwise.errors import ConfigError

SCRIPT = Path(__file__).with_name("ranked.py")


def run(processes, name, solver, out):
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = os.pathsep.join([str(SCRIPT.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(SCRIPT), name, solver, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.mark.parametrize(("name", "solver"), [("llama", "sparsegpt"), ("mixtral", "wanda"), ("routed", "sparsegpt")])
def test_two_processes_equal_one(tmp_path, name, solver):
    one = run(1, name, solver, tmp_path / "one")
    two = run(2, name, solver, tmp_path / "two")
    for layer, weight in one.items():
        assert torch.equal(weight == 0, two[layer] == 0), layer
        assert torch.allclose(weight, two[layer], rtol=1e-4, atol=1e-6)


def test_two_processes_share_their_codes(tmp_path):
    one, two = run(1, "llama", "gptq", tmp_path / "one"), run(2, "llama", "gptq", tmp_path / "two")
    codes = [name for name in one if name.endswith(" values")]
    assert len(codes) == 14
    assert one.keys() == two.keys()
    for name in codes:  # sums in another order: a weight that lies between two codes may go either way
        assert (one[name] != two[name]).float().mean() < 0.02, name
        for part in ("scale", "zero"):
            other = name.replace(" values", f" {part}")
            assert torch.allclose(one[other], two[other], rtol=0.05)


def test_owners_are_balanced_and_the_same_everywhere():
    ranks = [Ranks(rank, 3) for rank in range(3)]
    costs = [5.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    owners = {tuple(rank.owners(costs)) for rank in ranks}
    assert len(owners) == 1
    (owner,) = owners
    loads = [sum(cost for cost, who in zip(costs, owner) if who == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 1


def test_batches_are_split_without_loss():
    batches = list(range(7))
    parts = [Ranks(rank, 3).share_of(batches) for rank in range(3)]
    assert sorted(batch for part in parts for batch in part) == batches
    with pytest.raises(ConfigError, match="at least as many calibration batches"):
        Ranks(0, 8).share_of(batches)
