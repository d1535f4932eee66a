"""layerwise's side of `peers_pruning.py`, through its public API."""

import importlib.metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import layerwise as lw
from measuring import Job, run

# named here, so that importing their rooms on first use is not timed; the peer's side imports at the top too
walk_through, Batches, Settings, Uniform = lw.compress, lw.Batches, lw.Settings, lw.methods.Uniform
SOLVERS = {"magnitude": lw.solvers.Magnitude, "wanda": lw.solvers.Wanda, "sparsegpt": lw.solvers.SparseGPT}


def load(folder: Path) -> nn.Module:
    return lw.load(folder, dtype="float32")


def compress(model: nn.Module, batches: list[Tensor], job: Job) -> dict[str, Any]:
    data = Batches(tuple({"input_ids": ids} for ids in batches), {"source": Path(job.ids).name})
    plan = Uniform(sparsity=job.sparsity, pattern=job.pattern or "unstructured").plan(model)
    settings = Settings(propagate=job.propagate)
    result = walk_through(model, plan, solver=SOLVERS[job.solver](), data=data, settings=settings)
    return {"split": result.seconds, "notes": list(result.notes)}


if __name__ == "__main__":
    run(load, compress, {name: importlib.metadata.version(name) for name in ("layerwise", "transformers")})
