"""Small convolutional networks, one for each way in which channels can belong together."""

import torch
from torch import nn
from torch.nn import functional as F


class Toy(nn.Module):
    """The residual network of the checks: widths A, B, C, D; 19 696 weights at 16, 16, 32, 32, without norms and biases."""

    def __init__(self, a=16, b=16, c=32, d=32, norms=False):
        super().__init__()
        self.stem = nn.Conv2d(3, a, 3, 1, 1, bias=False)
        self.b1c1, self.b1c2 = nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.Conv2d(b, a, 3, 1, 1, bias=False)
        self.b2c1, self.b2c2 = nn.Conv2d(a, c, 3, 2, 1, bias=False), nn.Conv2d(c, d, 3, 1, 1, bias=False)
        self.proj = nn.Conv2d(a, d, 1, 2, bias=False)
        self.fc = nn.Linear(d, 10, bias=False)
        self.n1 = nn.BatchNorm2d(a) if norms else nn.Identity()
        self.n2 = nn.BatchNorm2d(c) if norms else nn.Identity()

    def forward(self, x):
        x = F.relu(self.n1(self.stem(x)))
        x = F.relu(x + self.b1c2(F.relu(self.b1c1(x))))
        x = F.relu(self.proj(x) + self.b2c2(F.relu(self.n2(self.b2c1(x)))))
        return self.fc(x.mean((2, 3)))


class OptionA(nn.Module):
    """Two blocks, the second with the parameter-free shortcut: every second place, zero channels on both sides."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.c1, self.c2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.d1, self.d2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.pad = width // 2
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.c2(F.relu(self.c1(x))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        x = F.relu(self.bn2(self.d2(F.relu(self.d1(x)))) + short)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.pool, self.down, self.up = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))


class LinearExcite(nn.Module):
    """The same with linears and reshapes."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x):
        b, c, _, _ = x.shape
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * torch.sigmoid(self.up(F.relu(self.down(y)))).view(b, c, 1, 1)


class Inverted(nn.Module):
    def __init__(self, inputs, hidden, outputs, stride=1, excite=None):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.excite = excite(hidden, 4) if excite else nn.Identity()
        self.project, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.same = stride == 1 and inputs == outputs

    def forward(self, x):
        y = F.relu6(self.bn2(self.depth(F.relu6(self.bn1(self.expand(x))))))
        y = self.bn3(self.project(self.excite(y)))
        return x + y if self.same else y


class MobileNet(nn.Module):
    """Inverted residuals, with squeeze-and-excitation if asked for."""

    def __init__(self, excite=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(
            Inverted(8, 16, 12, 2, excite), Inverted(12, 24, 12, 1, excite), Inverted(12, 24, 20, 1, excite)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(20, 10))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class DenseNet(nn.Module):
    """Every layer reads what all before it wrote."""

    def __init__(self, growth=6, layers=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(8 + i * growth, growth, 3, 1, 1) for i in range(layers))
        self.last = nn.BatchNorm2d(8 + layers * growth)
        self.fc = nn.Linear(8 + layers * growth, 10)

    def forward(self, x):
        seen = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            seen.append(conv(F.relu(norm(torch.cat(seen, 1)))))
        return self.fc(F.relu(self.last(torch.cat(seen, 1))).mean((2, 3)))


class Flat(nn.Module):
    """A LeNet: maps of 4x4 flattened into a linear. hard: the size written as a number."""

    def __init__(self, hard=False, nhwc=False):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 10, 3, 1, 1)
        self.f1, self.f2 = nn.Linear(10 * 16, 12), nn.Linear(12, 5)
        self.hard, self.nhwc = hard, nhwc

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.c2(x)), 4)
        x = x.permute(0, 2, 3, 1) if self.nhwc else x
        x = x.reshape(-1, 160) if self.hard else x.reshape(x.size(0), -1)
        return self.f2(F.relu(self.f1(x)))


class Shuffle(nn.Module):
    """ShuffleNet's unit: grouped, shuffled, depthwise, grouped, added."""

    def __init__(self, groups=2, computed=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.g1, self.bn1 = nn.Conv2d(16, 8, 1, groups=groups), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.g2 = nn.Conv2d(8, 16, 1, groups=groups)
        self.fc = nn.Linear(16, 10)
        self.groups, self.computed = groups, computed

    def shuffled(self, x):
        b, c, h, w = x.shape
        if self.computed:
            return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return x.view(-1, self.groups, 8 // self.groups, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.g2(self.depth(self.shuffled(F.relu(self.bn1(self.g1(x))))))
        return self.fc(F.relu(x).mean((2, 3)))


class Halves(nn.Module):
    """Chunks used differently (gate and value), and slices by number."""

    def __init__(self, how="chunk"):
        super().__init__()
        self.stem, self.a, self.fc = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(6, 7, 3, 1, 1), nn.Linear(13, 10)
        self.how = how

    def forward(self, x):
        x = self.stem(x)
        if self.how == "chunk":
            one, two = x.chunk(2, dim=1)
        elif self.how == "split":
            one, two = torch.split(x, [6, 6], dim=1)
        elif self.how == "computed":
            half = x.shape[1] // 2
            one, two = x[:, :half], x[:, half:]
        else:
            one, two = x[:, :6], x[:, 6:]
        return self.fc(torch.cat([F.relu(self.a(one)), torch.tanh(two)], dim=1).mean((2, 3)))


class Multiplied(nn.Module):
    """A depthwise convolution that writes two channels for each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.depth, self.bn = nn.Conv2d(6, 12, 3, 1, 1, groups=6), nn.BatchNorm2d(12)
        self.last, self.fc = nn.Conv2d(12, 8, 1), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(F.relu(self.last(F.relu(self.bn(self.depth(self.stem(x)))))).mean((2, 3)))


class UNet(nn.Module):
    """Down and up again, the way up beside what was on the way down; images in, maps out."""

    def __init__(self):
        super().__init__()
        self.a, self.down = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 10, 3, 2, 1)
        self.up, self.bn = nn.ConvTranspose2d(10, 5, 3, 2, 1, output_padding=1), nn.BatchNorm2d(5)
        self.last = nn.ConvTranspose2d(11, 2, 2, bias=False)

    def forward(self, x):
        x = F.relu(self.a(x))
        up = F.relu(self.bn(self.up(F.relu(self.down(x)))))
        return self.last(torch.cat([x, up], 1))


def filled(model, seed=0):
    """The model in evaluation mode with norms that do something."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=draw) * (0.3 if tensor.ndim > 1 else 0.2)
            tensor.data.copy_(
                values.abs() + 0.5 if "running_var" in name or ("bn" in name and "weight" in name) else values
            )
    return model.eval()


CNNS = {
    "toy": Toy,
    "toy-norms": lambda: Toy(norms=True),
    "option-a": OptionA,
    "mobilenet": MobileNet,
    "excite": lambda: MobileNet(SqueezeExcite),
    "linear-excite": lambda: MobileNet(LinearExcite),
    "densenet": DenseNet,
    "flat": Flat,
    "flat-nhwc": lambda: Flat(nhwc=True),
    "flat-hard": lambda: Flat(hard=True),
    "shuffle": Shuffle,
    "shuffle-numbers": lambda: Shuffle(computed=False),
    "chunk": Halves,
    "split": lambda: Halves("split"),
    "slices": lambda: Halves("slices"),
    "computed-slices": lambda: Halves("computed"),
    "multiplied": Multiplied,
    "unet": UNet,
}
IMAGE = (3, 8, 8)
