"""KVTuner: bits of the keys and values that each attention caches (Li et al. 2025, ICML, arXiv:2502.04420).

The error of every attention's output under every pair of bits; of these the pairs worth having (Pareto); attentions alike decide
together (DBSCAN); a search over the groups for few bits and little loss; the front held against the uniform pairs on data that the
search did not see. Departures from the official code (cmd2001/KVTuner):
D1 loss is the KL divergence from the model with its full cache, teacher-forced: smooth, and without generation; there it is accuracy on 200
prompts, with a standard error of 0.03. Any other loss can be handed in. D2 every token attends to keys and values as they are stored, as
in the paper; its group search leaves the prefill in full precision (`prefill="exact"`). D3 noise of the clustering is not pooled
(`noise="reference"` does it). D4 the first generation holds the uniform pairs, and the best sums of errors for many budgets. D5
uniform pairs are always tried, and a search that does not beat the best of them on unseen data returns it and says so. D6 bits are true
bits, scales and offsets counted (`nominal=True`: codes alone). D7 of the search, see `kv_search`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import nn

from ..engine import weights_key
from ..errors import BudgetError, ConfigError, DataError
from ..plan import CacheBits, Plan
from ..structure import Structure, structure_of
from ..tasks import undisturbed
from ..tasks.batches import Batch, Batches, first_samples
from ..treatments import CacheMode
from ..version import __version__
from .assemble import facts_of
from .kv_layers import Layers, layers_of, measured_errors, space_of, starts_of
from .kv_loss import Divergence, Metric, Prefill
from .kv_search import explore, opened, settings_key
from .kv_space import Pair, Pairs
from .kv_verdict import KVSearch, TriedBits, verdict_on
from .search import enough

if TYPE_CHECKING:
    from ..cache import QuantizedKVCache


@dataclass(frozen=True)
class KVTuner:
    """Defaults: the paper's, with the cap of its smaller setting."""

    name: ClassVar[str] = "kvtuner"
    summary: ClassVar[str] = "bits of cached keys and values, by attention, searched for few bits and little loss"
    needs_data: ClassVar[bool] = True

    bits: float = 4.0  # most bits of a cached number, the mean over attentions, scales and offsets counted
    nominal: bool = False  # count the codes alone
    levels: str = "2,4,8"  # bits that keys and values may have; 16 is full precision
    mode: str = "per-token"  # or kivi: keys in groups of tokens of one channel
    group: int = 0  # numbers that share a scale; 0: the mode's own
    residual: int = -1  # recent tokens that stay in full precision; -1: the mode's own
    prefill: str = "quantized"  # or exact: the loss is of each sample's second half alone
    trials: int = 200  # choices that are measured
    judged: int = 8192  # tokens that each is measured on, and again for the verdict
    prompts: int = 20  # samples that the errors of attention are measured on
    eps: float = 0.05  # attentions whose errors are this near share a group
    members: int = 2  # that make a group
    noise: str = "own"  # a group for each attention that is near none; "reference": one for all of them
    minutes: float = 0.0  # measure nothing new after that long (then the machine's speed decides, too); 0: no limit
    seed: int = 0

    def __post_init__(self) -> None:
        self.choices  # noqa: B018  (its errors)
        if not self.bits > 0:
            raise ConfigError(f"KVTuner.bits={self.bits:g}: give the most bits of a cached number, such as 4.")
        if self.mode not in ("per-token", "kivi"):
            raise ConfigError(f'KVTuner.mode="{self.mode}": give per-token or kivi.')
        if self.prefill not in ("quantized", "exact"):
            raise ConfigError(f'KVTuner.prefill="{self.prefill}": give quantized or exact.')
        if self.noise not in ("own", "reference"):
            raise ConfigError(f'KVTuner.noise="{self.noise}": give own or reference.')
        for name in ("trials", "judged", "prompts", "members"):
            if getattr(self, name) < 1:
                raise ConfigError(f"KVTuner.{name}={getattr(self, name)}: give a whole number, 1 or more.")
        if self.group < 0 or self.residual < -1:
            raise ConfigError(f"KVTuner.group={self.group}, residual={self.residual}: give group >= 0, residual >= -1.")
        if self.mode == "kivi" and 0 <= self.residual < (self.group or 32):
            raise ConfigError(
                f"KVTuner.residual={self.residual}: in mode kivi keys wait until their group of {self.group or 32} is whole; give as many."
            )
        for name in ("eps", "minutes"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"KVTuner.{name}={getattr(self, name):g}: give 0 or more.")

    @property
    def choices(self) -> tuple[int, ...]:
        """The bits of `levels`, fewest first."""
        words = [one.strip() for one in self.levels.split(",")]
        if not all(one in ("2", "4", "8", "16") for one in words) or len(set(words)) < len(words):
            raise ConfigError(f'KVTuner.levels="{self.levels}": give some of 2,4,8,16, each once.')
        return tuple(sorted(map(int, words)))

    def treatment(self, pair: Pair) -> CacheBits:
        """What an attention with these bits gets in a plan."""
        return CacheBits(
            key_bits=pair[0],
            value_bits=pair[1],
            mode=cast(CacheMode, self.mode),
            group=self.group or None,
            residual=None if self.residual < 0 else self.residual,
        )

    def cached(self, pairs: Pairs, model: nn.Module | None = None) -> "QuantizedKVCache":
        """An empty cache of these pairs, one for each decoder layer."""
        from ..cache import QuantizedKVCache

        one = self.treatment((2, 2))
        config = None if model is None else model.config
        return QuantizedKVCache(pairs, one.mode, one.group, one.residual, self.prefill == "quantized", config)

    def plan(self, model: nn.Module, data: Batches | None = None, *, structure: Structure | None = None) -> Plan:
        """The plan of `search`, which also tells what was tried."""
        return self.search(model, data, structure=structure).plan

    def search(
        self,
        model: nn.Module,
        data: Batches | None = None,
        *,
        structure: Structure | None = None,
        storage: str | Path | None = None,
        metric: Metric | None = None,
    ) -> KVSearch:
        """Measure, group, search, judge. The model is not touched.

        The last quarter of the batches is kept for the verdict. storage: a journal file, or a database URL, from which a search for the
        same thing goes on and in which several workers share one; None: memory. metric: instead of the divergence; a function whose
        results depend on more than the model's weights, the data and its own qualified name should not share a storage with itself.
        Raises BudgetError saying what bits are feasible, ModelError for a model without a cache of the usual kind, DataError for fewer
        than two batches, MissingExtra without Optuna.
        """
        structure = structure_of(model) if structure is None else structure
        if data is None or len(data) < 2:
            raise DataError(
                "KVTuner needs calibration data (--data), two batches or more: it searches on some and decides on the others."
            )
        seen, unseen = _parted(data)
        with undisturbed([model]):
            layers = layers_of(model, seen[0], self.treatment((2, 2)), self.nominal)
            self._check_budget(layers)
            place = opened(storage)  # its errors before the work, but no file of a search that cannot be
            errors = measured_errors(model, first_samples(seen, self.prompts), layers, self.choices)
            space = space_of(errors, layers, self.eps, self.members, self.noise)
            uniform = [(pair,) * len(layers.names) for pair in layers.pairs(self.choices)]
            metric, some = metric or Divergence(cast(Prefill, self.prefill)), enough(seen, self.judged)

            def rows(pairs: Pairs, batches: Sequence[Batch]) -> torch.Tensor:
                every = layers.spread(pairs)
                with torch.no_grad():
                    return metric(model, lambda: self.cached(every, model), batches)

            tried = explore(
                space,
                lambda pairs: float(layers.bits(pairs)),
                lambda pairs: float(rows(pairs, some).mean()),
                self.bits,
                trials=self.trials,
                first=[*uniform, *starts_of(space, errors, layers, self.bits)],
                always=uniform,
                seed=self.seed,
                storage=place,
                key=self._key(model, structure, seen, metric),
                minutes=self.minutes,
            )
            listed = [TriedBits.of(pairs, layers, loss) for pairs, loss in tried.items()]
            what = "KL divergence" if isinstance(metric, Divergence) else "loss"
            fresh = enough(unseen, self.judged)
            verdict = verdict_on(listed, self.bits, lambda pairs: rows(pairs, fresh), what)
        plan = Plan(
            model=facts_of(model, structure),
            method=self,
            layers={name: self.treatment(pair) for name, pair in zip(layers.names, verdict.pairs, strict=True)},
            scores={name: errors[name][pair] for name, pair in zip(layers.names, verdict.pairs, strict=True)},
            notes=(*layers.notes(space, self.choices), verdict.sentence),
        )
        return KVSearch(plan, verdict.tried, verdict.sentence, space)

    def _check_budget(self, layers: Layers) -> None:
        low, high = (
            float(layers.bits(((end, end),) * len(layers.names))) for end in (self.choices[0], self.choices[-1])
        )
        if self.bits < low:
            scales = "" if self.nominal else ", scales and offsets counted"
            raise BudgetError(
                f"{self.bits:g} bits for each cached number: {low:g} to {high:g} are feasible with levels {self.levels}"
                f" in mode {self.mode}{scales}. Give more bits{'' if self.nominal else ', or nominal=true'}."
            )

    def _key(self, model: nn.Module, structure: Structure, seen: Sequence[Batch], metric: Metric) -> str:
        """What the losses depend on, and the search: the same question goes on from what is known."""
        plain = replace(self, minutes=0.0, trials=1)  # more trials go on from fewer
        return settings_key({
            **asdict(plain),
            "model": weights_key(model, structure),
            "data": Batches(tuple(seen), {}).hash,
            "metric": getattr(metric, "__qualname__", type(metric).__qualname__),
            "layerwise": __version__,
            "torch": torch.__version__,
        })  # fmt: skip


def _parted(data: Batches) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """What is searched on, and the last quarter for the verdict."""
    unseen = max(1, len(data) // 4)
    return data[:-unseen], data[-unseen:]
