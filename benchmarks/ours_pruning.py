"""layerwise's side of `peers_pruning.py` and `peers_gptq.py`, through its public API."""

import importlib.metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import layerwise as lw
from measuring import Job, run

# named here, so that importing their rooms on first use is not timed; the peer's side imports at the top too
walk_through, Batches, Settings = lw.compress, lw.Batches, lw.Settings
Uniform, UniformBits = lw.methods.Uniform, lw.methods.UniformBits
SOLVERS = {
    "magnitude": lw.solvers.Magnitude,
    "wanda": lw.solvers.Wanda,
    "sparsegpt": lw.solvers.SparseGPT,
    "gptq": lw.solvers.GPTQ,
}


def load(folder: Path) -> nn.Module:
    return lw.load(folder, dtype="float32")


def compress(model: nn.Module, batches: list[Tensor], job: Job) -> dict[str, Any]:
    data = Batches(tuple({"input_ids": ids} for ids in batches), {"source": Path(job.ids).name})
    if job.bits:
        plan = UniformBits(bits=job.bits[0], group=job.bits[1], symmetric=True).plan(model)
    else:
        plan = Uniform(sparsity=job.sparsity, pattern=job.pattern or "unstructured").plan(model)
    settings = Settings(propagate=job.propagate)
    result = walk_through(model, plan, solver=SOLVERS[job.solver](), data=data, settings=settings)
    return {"split": result.seconds, "notes": list(result.notes)}


if __name__ == "__main__":
    run(load, compress, {name: importlib.metadata.version(name) for name in ("layerwise", "transformers")})
