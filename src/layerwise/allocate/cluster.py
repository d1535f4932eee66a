"""Layers that are alike decide together: DBSCAN (Ester et al. 1996) inside each set of layers that have the same choices left."""

from collections.abc import Mapping, Sequence
from math import dist
from typing import Literal, TypeVar

from ..errors import ConfigError

C = TypeVar("C")
Noise = Literal["own", "reference"]


def dbscan(rows: Sequence[Sequence[float]], eps: float = 0.05, minimum: int = 2) -> list[int]:
    """A label for each row: 0, 1, ... in the order of first core members, -1 for noise. Euclidean distances.

    A row with `minimum` rows within `eps`, itself counted, is a core; cores within `eps` of each other share a cluster, and what else is
    within `eps` of one joins the first such cluster. As scikit-learn's.
    """
    near = [[other for other, b in enumerate(rows) if dist(a, b) <= eps] for a in rows]
    labels, clusters = [-1] * len(rows), 0
    for start in range(len(rows)):
        if labels[start] != -1 or len(near[start]) < minimum:
            continue
        labels[start], waiting = clusters, [start]
        while waiting:
            core = waiting.pop()
            for other in near[core]:
                if labels[other] == -1:
                    labels[other] = clusters
                    if len(near[other]) >= minimum:
                        waiting.append(other)
        clusters += 1
    return labels


def clusters(
    errors: Mapping[str, Mapping[C, float]], eps: float = 0.05, minimum: int = 2, noise: Noise = "own"
) -> list[tuple[str, ...]]:
    """Groups of names, each name once, in the order of first members.

    errors: name -> choice -> error, of the choices that are left for it. Only names with the same choices left share a group; among
    them DBSCAN over the vectors of errors decides. noise: what is near nothing has a group of its own; "reference" puts all the noise
    of one set of choices into a single group, as the published KVTuner groups do, though its members are alike in nothing.
    """
    if noise not in ("own", "reference"):
        raise ConfigError(f'clusters: noise="{noise}": give own or reference.')
    parts: dict[frozenset[C], list[str]] = {}
    for name, of_choice in errors.items():
        parts.setdefault(frozenset(of_choice), []).append(name)
    groups: list[list[str]] = []
    for names in parts.values():
        order = list(errors[names[0]])
        labels = dbscan([[errors[name][choice] for choice in order] for name in names], eps, minimum)
        found: dict[int, list[str]] = {}
        for place, (name, label) in enumerate(zip(names, labels, strict=True)):
            alone = label == -1 and noise == "own"
            found.setdefault(-2 - place if alone else label, []).append(name)
        groups += found.values()
    places = {name: index for index, name in enumerate(errors)}
    return [tuple(group) for group in sorted(groups, key=lambda group: places[group[0]])]
