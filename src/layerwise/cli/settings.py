"""From the words of the command line to settings, methods, solvers, devices: all checked before any work."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from ..settings import build, pairs, words_of

if TYPE_CHECKING:
    import torch

    from ..engine.settings import Propagate
    from ..evaluate.logits import Convention
    from ..methods import Method
    from ..plan import Plan
    from ..recover import Reconstruction
    from ..solvers import Solver

    Treatment = Literal["none", "prune", "quantize", "factorize"]

DEFAULT_METHOD, DEFAULT_OF_BITS, DEFAULT_OF_WIDTHS = "uniform", "uniform-bits", "adapt-pruner"
FACTORIZER = "armor"  # a method and a solver
DEFAULT_SOLVERS: "dict[Treatment, str]" = {
    "none": "magnitude",
    "prune": "wanda",
    "quantize": "gptq",
    "factorize": FACTORIZER,
}


@dataclass(frozen=True)
class MethodChoice:
    """A method as asked for: its name, the common settings, and `--set name=value`."""

    name: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    min_sparsity: float | None = None
    max_sparsity: float | None = None
    set: Sequence[str] = ()
    minutes: float | None = None
    bits: float | None = None
    levels: str | None = None
    target: str | None = None
    parameters: float | None = None
    macs: float | None = None
    latency: float | None = None

    def build(self, name: str | None = None, **more: Any) -> "Method":
        """The method, `more` added where it has such settings. Raises ConfigError for an unknown name or setting, offering the nearest."""
        from ..methods import METHODS, method_from

        if name is None and self.name is None and self.chosen == DEFAULT_OF_BITS and self.bits and self.bits % 1:
            raise ConfigError(
                f"--bits {self.bits:g}: a mean of several levels needs a method that hands them out: give --method least-error (or lwq)."
            )
        name = name or self.chosen
        common = {
            "sparsity": self.sparsity if name == FACTORIZER else self._sparsity(),
            "pattern": self.pattern,
            "min_sparsity": self.min_sparsity,
            "max_sparsity": self.max_sparsity,
            "minutes": self.minutes,
            "bits": self._bits(name),
            "levels": self.levels,
            "target": self.target,
            **(share := self._share()),
        }
        given = {key: value for key, value in common.items() if value is not None}
        if name in METHODS:
            known = {one.name for one in fields(METHODS[name])}  # type: ignore[arg-type]
            if odd := next((key for key in given if key not in known), None):
                option, wanted = self._option_of(odd), {*share} if odd in share else {odd}
                others = ", ".join(one for one, kind in METHODS.items() if wanted <= {f.name for f in fields(kind)})  # type: ignore[arg-type]
                raise ConfigError(
                    f"method {name} takes no {option} {share['parameters'] if odd in share else given[odd]}."
                    f" It has {', '.join(sorted(known))}; methods that take {option}: {others}."
                )
            given |= {key: value for key, value in more.items() if key in known}
        settings = pairs(self.set, "--set")
        if odd := next((one for one in ("solver", "solver_set") if one in settings and one in more), None):
            raise ConfigError(
                f"--set {odd}={settings[odd]}: the solver of this command is given by --{odd.replace('_', '-')}."
            )
        typed = {key: share[key] if key in share else getattr(self, key) for key in common}
        if twice := [key for key, value in typed.items() if key in settings and value is not None]:
            raise ConfigError(
                f"{self._option_of(twice[0])} and --set {twice[0]}=: the same setting twice. Give it once."
            )
        return method_from(name, **{**given, **settings})

    def _share(self) -> dict[str, Any]:
        """What is kept of what. Raises ConfigError for two of them."""
        given = {
            name: getattr(self, name) for name in ("parameters", "macs", "latency") if getattr(self, name) is not None
        }
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(f'--{name}' for name in given)}: a budget each. Give one of them.")
        if not given or "parameters" in given:
            return {"parameters": self.parameters}
        kind, share = next(iter(given.items()))
        return {"parameters": share, "budget": kind}

    def _option_of(self, setting: str) -> str:
        """What was typed for a setting."""
        if setting in ("parameters", "budget"):
            return next(
                (f"--{name}" for name in ("macs", "latency") if getattr(self, name) is not None), "--parameters"
            )
        return "--for" if setting == "target" else f"--{setting.replace('_', '-')}"

    @property
    def narrows(self) -> bool:
        """Whether the method cuts heads, channels or blocks."""
        from ..methods import METHODS

        return self.chosen in METHODS and "parameters" in {one.name for one in fields(METHODS[self.chosen])}  # type: ignore[arg-type]

    @property
    def chosen(self) -> str:
        """The method's name; where none is given, that of the plainest method for the budget that is."""
        if self.name:
            return self.name
        if self._share()["parameters"] is not None:
            return DEFAULT_OF_WIDTHS
        return DEFAULT_OF_BITS if self.bits is not None and self.sparsity is None else DEFAULT_METHOD

    @property
    def treatment(self) -> "Treatment":
        """What the method plans, and its solver must do: most prune, those that hand out bits of weights quantise."""
        from ..methods import METHODS

        name = self.chosen
        if name == FACTORIZER:
            return "factorize"
        known = {one.name for one in fields(METHODS[name])} if name in METHODS else set()  # type: ignore[arg-type]
        return "quantize" if {"bits", "symmetric"} <= known else "prune"

    def _bits(self, name: str) -> float | int | None:
        """A whole number where the method wants one: an option cannot know which method it is for."""
        from ..methods import METHODS

        whole = name in METHODS and next((f.type for f in fields(METHODS[name]) if f.name == "bits"), None) is int  # type: ignore[arg-type]
        return int(self.bits) if whole and self.bits is not None and self.bits.is_integer() else self.bits

    def _sparsity(self) -> float | None:
        if self.sparsity is None and self.pattern is not None and ":" in self.pattern:
            from ..plan import Prune

            kept, _, group = self.pattern.partition(":")
            if kept.isdigit() and group.isdigit() and 0 < int(kept) <= int(group):
                return Prune(sparsity=1 - int(kept) / int(group), pattern=self.pattern).sparsity
        return self.sparsity


def treatment_of(plan: "Plan") -> "Treatment":
    """What a solver must do for this plan: what is furthest from pruning; nothing where weights stay as they are."""
    for treatment in ("factorize", "quantize", "prune"):
        if any(getattr(one, treatment) for one in plan.layers.values()):
            return treatment
    return "none"


def solver_of(
    name: str | None, settings: Sequence[str], planned: dict[str, Any] | None = None, treatment: "Treatment" = "prune"
) -> "Solver":
    """The solver asked for, else the plan's, else the usual one: wanda prunes, gptq quantizes, armor factorizes. Raises ConfigError."""
    from ..solvers import solver_from

    usual = DEFAULT_SOLVERS[treatment]
    chosen = {"name": name or usual} if name or not planned else dict(planned)
    return solver_from({**chosen, **pairs(settings, "--solver-set")})


def handed_in(solver: "Solver") -> dict[str, Any]:
    """What methods are told of the solver that will carry out their plan: those settings of a method that are about it."""
    from ..solvers import group_bits_of

    scale, shift = group_bits_of(solver)
    return {"solver": solver.name, "solver_set": words_of(solver), "shift": shift, "scale_bits": scale}


def tuner_of(asked: bool, settings: Sequence[str], seed: int) -> "Reconstruction | None":
    """What tunes solved blocks, if that is asked for. Raises ConfigError."""
    if not asked:
        return None
    from ..recover import Reconstruction

    given = {"seed": seed, **pairs(settings, "--reconstruct-set")}
    return build("tuner", {"reconstruction": Reconstruction}, "reconstruction", given)


def device_of(name: str) -> "torch.device":
    """The device, if this machine has it. Raises ConfigError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device "{name}": give auto, cpu, cuda, cuda:1 or mps.') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count() or "no"
        raise ConfigError(f'device "{name}": torch sees {there} CUDA device(s) here. Give auto or cpu.')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f'device "{name}": torch has no MPS here. Give auto or cpu.')
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f'device "{name}": give auto, cpu, cuda, cuda:1 or mps.')
    return device


def dtype_of(name: str) -> "torch.dtype | None":
    """Checked word of `--dtype`; None for auto."""
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f'--dtype "{name}": give auto, float32, bfloat16 or float16.')
    return known[name]


def propagate_of(name: str) -> "Propagate":
    """Checked word of `--propagate`."""
    if name not in ("compressed", "dense"):
        raise ConfigError(f'--propagate "{name}": give compressed or dense.')
    return "dense" if name == "dense" else "compressed"


def convention_of(name: str) -> "Convention":
    """Checked word of `--convention`."""
    for known in ("standard", "wanda", "all"):
        if name == known:
            return known
    raise ConfigError(f'--convention "{name}": give standard, wanda or all.')
