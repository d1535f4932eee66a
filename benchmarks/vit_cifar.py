"""The ViT of the bed, trained on CIFAR-10, in the layout of timm: q, k and v in one linear, so that every matrix is a layer of its own."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.tasks import Batches

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, tokens, dim))


class Block(nn.Module):
    """Post-norm with ReLU, as `nn.TransformerEncoderLayer` is by default; dropout 0.1 while it is trained."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x)))
        return self.norm2(x + self.drop(self.fc2(self.drop(F.relu(self.fc1(x))))))


class ViT(nn.Module):
    def __init__(
        self,
        dim: int = 128,
        depth: int = 6,
        heads: int = 8,
        hidden: int = 256,
        pixels: int = 32,
        patch: int = 4,
        channels: int = 3,
        classes: int = 10,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, (pixels // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


_RENAMED = (
    ("patch_embed.proj.", "patch."),
    ("cls_token", "cls"),
    ("pos_embed", "positions"),
    ("transformer.layers.", "blocks."),
    ("self_attn.in_proj_", "attn.qkv."),
    ("self_attn.out_proj.", "attn.proj."),
    ("linear1.", "fc1."),
    ("linear2.", "fc2."),
    ("mlp_head.0.", "norm."),
    ("mlp_head.1.", "head."),
)


def load_vit(bed: Path) -> ViT:
    """`vision/cifar10-vit-post-norm.safetensors`, a state dict around `nn.TransformerEncoder`, under our names."""
    stored = load_file(bed / "vision/cifar10-vit-post-norm.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        renamed[name] = tensor
    model = ViT()
    model.load_state_dict(renamed)
    return model.eval()


def cifar(bed: Path, name: str, start: int, count: int, batch: int = 100) -> Batches:
    """`count` images of `data/cifar10-NAME.npz` from `start` on, normalised as the ViT was trained."""
    with np.load(bed / f"data/cifar10-{name}.npz", allow_pickle=False) as data:
        pixels, labels = data["images"][start : start + count], data["labels"][start : start + count]
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    values = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    targets = torch.from_numpy(labels).long()
    groups = zip(values.split(batch), targets.split(batch), strict=True)
    facts = {"source": f"cifar10-{name}", "start": start, "samples": len(targets)}
    return Batches(tuple({"pixel_values": v, "labels": t} for v, t in groups), facts)
