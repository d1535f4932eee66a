"""What can be wrong with one entry of a plan, given the layers and blocks of a model."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from .settings import nearest
from .treatments import Treatments


class Sized(Protocol):
    """What a plan reads of a layer."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


def entry_problems(
    number: int,
    name: str,
    entry: Treatments,
    entries: Mapping[str, Treatments],
    known: Mapping[str, Sized],
    blocks: set[str],
    attentions: Sequence[str] = (),
) -> list[str]:
    """What is wrong with one entry of the plan, given the model's layers, blocks and attentions (empty: not known)."""
    where, names = f'plan: entry {number}, "{name}"', [*known, *blocks, *attentions]
    if (
        name not in known
        and name not in blocks
        and name not in attentions
        and not any(other.startswith(f"{name}.") for other in names)
    ):
        return [f"{where}: the model has no layer or block of this name.{nearest(name, names, cutoff=0.6)}"]
    if name not in known:
        weights = [field for field in ("prune", "quantize", "factorize") if getattr(entry, field)]
        problems = [f"{where}: {field} needs a layer with a weight. Name the layers inside it." for field in weights]
    else:
        one = known[name]
        problems = [f"{where}: {problem}" for problem in entry.problems(one.rows, one.columns, one.size)]
    if entry.drop and blocks and name not in blocks:
        problems.append(f"{where}: drop removes a whole block, and this is none. Name a block such as {min(blocks)}.")
    if entry.cache and (name in known or (attentions and name not in attentions)):
        such = f" such as {attentions[0]}" if attentions else ""
        problems.append(f"{where}: cache is of an attention, and this is none. Name one{such}.")
    if entry.train and entry.train.probability is not None and blocks and name not in blocks:
        problems.append(
            f"{where}: train.probability is of a whole block, and this is none. Name a block such as {min(blocks)}, or give a rate."
        )
    for outer in (name[:i] for i, letter in enumerate(name) if letter == "."):
        if outer in entries and entries[outer].drop:
            problems.append(f'{where}: the plan drops "{outer}", which holds it. Remove one of the two entries.')
    return problems
