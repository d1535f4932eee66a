"""Private random streams. The global seeds of Python, numpy and torch are never touched."""

import hashlib

import torch


def generator_for(seed: int, name: str) -> torch.Generator:
    """The stream of one layer. Draw on the CPU, then `.to(weight)`: the same numbers on every device, in any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()  # not hash(): that differs between processes
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
