"""Your own data, and a model that is no language model: batches are plain dictionaries of what `forward` takes.

    python examples/own_data.py

`layerwise.text` reads text, JSONL and Parquet files for language models. For everything else build `Batches` yourself:
each batch is passed to the model as keyword arguments, and `protocol` says where the numbers come from.
"""

import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.plan import Budget, Plan, Prune
from layerwise.structure import structure_of
from layerwise.tasks import Batches

WIDTH, BLOCKS = 32, 3


class Residual(nn.Module):
    """x + up-projection, activation, down-projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Sensor(nn.Module):
    """Readings (batch, WIDTH) -> two numbers. `layerwise` finds the three blocks and their layers by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, readings: Tensor) -> Tensor:
        for block in self.blocks:
            readings = block(readings)
        return self.head(readings)


def main() -> dict[str, float]:
    """Prune 75 % of each layer with and without looking at the data; returns the relative error of the outputs of each."""
    random = torch.Generator().manual_seed(0)
    loud = torch.linspace(
        0.1, 3.0, WIDTH
    )  # some inputs carry much more signal than others: that is what Wanda looks at
    shown, kept = (torch.randn(n, WIDTH, generator=random) * loud for n in (256, 64))
    data = Batches(
        tuple({"readings": part} for part in shown.split(64)), {"source": "made-up readings", "samples": 256}
    )

    errors = {}
    for solver in (lw.solvers.Magnitude(), lw.solvers.Wanda(), lw.solvers.SparseGPT()):
        torch.manual_seed(0)
        model = Sensor().eval()
        with torch.no_grad():
            before = model(readings=kept)
        layers = structure_of(model).layers
        plan = Plan(budget=Budget(sparsity=0.75), layers={layer.name: Prune(sparsity=0.75) for layer in layers})
        lw.compress(model, plan, solver=solver, data=data)
        with torch.no_grad():
            errors[solver.name] = float((model(readings=kept) - before).norm() / before.norm())
        print(f"{solver.name}: relative error of the outputs {errors[solver.name]:.3f}")
    return errors


if __name__ == "__main__":
    main()
