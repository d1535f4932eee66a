"""Train a network without most of its weights from the first step on: random masks, held while it learns scikit-learn's digits.

    python examples/train_sparse.py

The plan says how many weights each layer keeps; which ones, a coin decides (Liu et al. 2022, arXiv:2202.02643). With the stock
transformers Trainer the loop below is `Trainer(..., callbacks=[Masks(model, keep).callback()])`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.recover import hold, kaiming_normal, random_masks
from layerwise.tasks import images


class Net(nn.Module):
    """(batch, 1, 8, 8) -> ten numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(pixel_values))), 2)
        return self.fc(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


def main(sparsity: float = 0.9, epochs: int = 15, seed: int = 0) -> tuple[float, int]:
    """Returns the accuracy on images that were held out, and the number of weights that are not zero."""
    model = Net()
    structure = lw.structure_of(model, include=["*"])  # the first convolution and the classifier, too
    kaiming_normal(model, structure, seed)
    plan = lw.methods.ERK(sparsity=sparsity).plan(model, structure=structure)
    keep = random_masks(plan, structure, seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    data = images("digits", batch=64)
    with hold(model, keep, optimizer) as masks:  # what is pruned stays zero, and no optimiser sees a gradient of it
        for _ in range(epochs):
            for batch in data:
                loss = F.cross_entropy(model(batch["pixel_values"]), batch["labels"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            rates.step()
    model.eval()
    right = total = 0
    with torch.no_grad():
        for batch in images("digits", split="held-out"):
            right += int((model(batch["pixel_values"]).argmax(1) == batch["labels"]).sum())
            total += len(batch["labels"])
    weights = sum(int(model.get_parameter(layer.parameter).count_nonzero()) for layer in structure)
    print(
        f"{weights} of {sum(layer.size for layer in structure)} weights ({masks.density:.1%}): {right / total:.1%} right"
    )
    return right / total, weights


if __name__ == "__main__":
    main(sparsity=0.0)
    main()
