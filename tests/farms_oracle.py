"""The recipe as the papers give it, step by step: singular values window by window, one cut at a time. Slow, clear, and the judge."""

import math

import torch

# a matrix and the pooled eigenvalues of its four windows of 3 x 3, worked apart from this code
WORKED = torch.tensor([[3.0, 1, 0, 2, 1, 4], [1, 2, 2, 0, 3, 1], [0, 1, 4, 1, 2, 2], [2, 0, 1, 3, 1, 1]])
POOLED = [
    0.039056, 0.664412, 0.752464, 1.645707, 4.059840, 6.628199, 6.988937, 10.544241, 22.707389, 24.703295, 25.294453, 32.972007,
]  # fmt: skip


def window_eigenvalues(weight, rows, aspect, count):
    """Squared singular values of every window, pooled and sorted."""
    height = min(rows, *weight.shape)
    width = int(height * aspect)
    starts = []
    for length, window in zip(weight.shape, (height, width)):
        step = max(1, (length - window) // (count - 1))
        number = min(count, max(1, (length - window) // step + 1))
        starts.append([min(index * step, length - window) for index in range(number)])
    values = [
        torch.linalg.svdvals(weight[top : top + height, left : left + width]) ** 2
        for top in starts[0]
        for left in starts[1]
    ]
    return torch.cat(values).sort().values


def alpha_at(values, i):
    tail = [math.log(value) for value in values[i:].tolist()]
    return 1 + len(tail) / (sum(tail) - len(tail) * tail[0])


def distance_at(values, i):
    alpha, n = alpha_at(values, i), len(values) - i
    law = 1 - (values[i:] / values[i]) ** (1 - alpha)
    return float((law - torch.arange(n) / n).abs().max())


def peak_alpha(values, *, reference):
    """(alpha, number of candidates)"""
    values = values.double()
    logs = values.log10()
    counts = torch.histc(logs, 100, float(logs.min()), float(logs.max()))
    peak = 10 ** (float(logs.min()) + int(counts.argmax()) * float(logs.max() - logs.min()) / 100)
    lower = math.log10(0.95 * peak) if reference else 0.95 * peak
    cuts = [i for i in range(len(values) - 1) if lower <= values[i] <= 1.5 * peak]
    return alpha_at(values, min(cuts, key=lambda i: distance_at(values, i))), len(cuts)
