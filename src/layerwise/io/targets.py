"""What the engines that load a saved folder can run, checked on a plan before any work and on codes before they are written.

vLLM fuses q, k and v, gate and up, and the experts of a block. Its matching of fused layers takes the scheme of the first one for all, so
that different bits fail while weights load, and it raises where only some are quantised. Read in its sources of 2026, not run here: 4 and
8 bits go to Marlin (groups of 32, 64, 128 or whole rows; zeros with 4 bits alone), other bits to Humming; its compressed-tensors is 0.17,
which packs 3, 5, 6 and 7 bits otherwise than 0.18 and later. Its kernels for experts have 4 and 8 bits without zeros.

transformers 5.23 takes the scheme of the first group whose pattern names experts for all experts of a model, and no zeros of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from ..errors import ConfigError, PlanError
from ..plan import Plan
from ..structure import fused_of
from ..structure.fused import VLLM_BITS, VLLM_EXPERT_BITS
from .pack_quantized import Scheme

Target = Literal["transformers", "vllm"]
VLLM_GROUPS = (None, 32, 64, 128)


def target_of(name: str) -> Target:
    """The checked word. Raises ConfigError."""
    for known in get_args(Target):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f'target "{name}": give transformers or vllm.')


def check_plan(plan: Plan, linears: Iterable[str], target: Target) -> None:
    """Raise PlanError listing every way in which the target cannot run this plan. linears: names of every linear of the model."""
    check_schemes(planned_schemes(plan), linears, target)


def planned_schemes(plan: Plan) -> dict[str, Scheme]:
    """Layer -> scheme, of the layers that the plan gives bits."""
    planned = {name: one.quantize for name, one in plan.layers.items() if one.quantize}
    return {name: Scheme(one.bits, one.group, one.symmetric) for name, one in planned.items()}


def check_schemes(schemes: Mapping[str, Scheme], linears: Iterable[str], target: Target) -> None:
    """The same of schemes by layer."""
    if target == "vllm" and (problems := vllm_problems(schemes, linears)):
        raise PlanError(problems)


def vllm_problems(schemes: Mapping[str, Scheme], linears: Iterable[str]) -> list[str]:
    """One sentence for each reason why vLLM would not run these layers; linears without a scheme stay dense."""
    without: dict[str, list[str]] = {}  # why no kernel takes them -> layers
    for name, scheme in schemes.items():
        if reason := _no_kernel(scheme):
            without.setdefault(reason, []).append(name)
    problems = [f"vllm: {some_layers(names)}: {reason}" for reason, names in without.items()]
    for group in fused_of(linears):
        kinds: dict[Scheme | None, list[str]] = {}
        for name in group:
            kinds.setdefault(schemes.get(name), []).append(name)
        if len(kinds) > 1:
            problems.append(
                f"vllm: it runs {_some(group)} as one, and they differ ({_have(kinds)}). Give them one treatment."
            )
    return problems


def unlike_experts(schemes: Mapping[str, Scheme], target: Target) -> str | None:
    """Why the target cannot read packed experts of these schemes, and what to do; None if it can. schemes: by the experts' parameters."""
    if any(not scheme.symmetric for scheme in schemes.values()):
        return "experts are read without zeros alone. Take symmetric: true."
    bits = sorted({scheme.bits for scheme in schemes.values()} - {*VLLM_EXPERT_BITS})
    if target == "vllm" and bits:
        return f"its kernels for experts have 4 and 8 bits, not {bits[0]}. Take one of these."
    whole = "a block" if target == "vllm" else "a model"
    together: dict[str, dict[Scheme | None, list[str]]] = {}
    for name, scheme in schemes.items():
        owner = name.rpartition(".")[0] if target == "vllm" else ""
        together.setdefault(owner, {}).setdefault(scheme, []).append(name)
    for kinds in together.values():
        if len(kinds) > 1:
            return (
                f"all experts of {whole} have one scheme there, and these differ ({_have(kinds)}). Give them one, as methods that hand"
                " out bits do with --for."
            )
    return None


def _have(kinds: Mapping[Scheme | None, list[str]]) -> str:
    return "; ".join(
        f"{_first(names)} {scheme.words() if scheme else 'not quantised'}" for scheme, names in kinds.items()
    )


def _no_kernel(scheme: Scheme) -> str | None:
    if scheme.bits not in VLLM_BITS:
        return f"{scheme.bits} bits are packed in a way that its compressed-tensors does not read. Take 2, 4 or 8."
    if scheme.group not in VLLM_GROUPS:
        return f"its kernels have no groups of {scheme.group}. Take 32, 64, 128, or null for a whole row."
    if scheme.bits == 8 and not scheme.symmetric:
        return "8 bits with zeros have no kernel but on Hopper. Take symmetric: true."
    return None


def some_layers(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} layer{'s' if len(names) > 1 else ''} ({some})"


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _some(names: tuple[str, ...]) -> str:
    if len(names) > 4:
        return f"{names[0]} … {names[-1]} ({len(names)} layers)"
    above = names[0].rpartition(".")[0]
    return f"{', '.join(name.removeprefix(f'{above}.') for name in names)} of {above or 'the model'}"
