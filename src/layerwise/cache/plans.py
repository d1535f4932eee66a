"""The `cache` treatments of a plan, as the bits of every layer."""

from ..errors import PlanError
from ..plan import Plan
from .scheme import FULL, Pair, Scheme


def has_cache(plan: Plan) -> bool:
    """Whether any entry of the plan has bits for the KV cache."""
    return any(treatments.cache is not None for treatments in plan.layers.values())


def pairs_of(plan: Plan, layers: int | None) -> tuple[list[Pair], Scheme]:
    """Bits of each of the decoder's `layers` and the one scheme of all; layers without an entry stay in full precision. layers None: as
    many as the entries name.

    Raises PlanError with every problem: no such entry, names that are no attention of one stack, schemes that differ.
    """
    entries = {name: treatments.cache for name, treatments in plan.layers.items() if treatments.cache is not None}
    if not entries:
        raise PlanError(
            "plan: no entry has cache, so there are no bits for a KV cache. Add cache: {key_bits: 8, value_bits: 4}."
        )
    if layers is None:
        layers = 1 + max((index for name in entries if (index := layer_index(name)) is not None), default=-1)
    pairs, problems = [FULL] * layers, []
    first, first_entry = next(iter(entries.items()))
    seen: dict[int, str] = {}
    for name, entry in entries.items():
        index = layer_index(name)
        if index is None or index >= layers:
            problems.append(
                f'plan: "{name}": the model has {layers} decoder layers, and this is none\'s attention. Name it such as'
                " model.layers.0.self_attn."
            )
        elif index in seen:
            problems.append(
                f'plan: "{seen[index]}" and "{name}" are both of layer {index}. Keep the decoder\'s attention.'
            )
        else:
            seen[index], pairs[index] = name, (entry.key_bits, entry.value_bits)
        if (entry.mode, entry.group, entry.residual) != (first_entry.mode, first_entry.group, first_entry.residual):
            problems.append(
                f'plan: "{name}" and "{first}" differ in mode, group or residual, which the whole cache shares. Make them alike.'
            )
    if problems:
        raise PlanError(problems)
    return pairs, Scheme(first_entry.mode, first_entry.group, first_entry.residual)


def layer_index(name: str) -> int | None:
    """The number in the name of an attention: 3 of "model.layers.3.self_attn"; None without one."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdigit()), None)
