"""TempBalance: each epoch a learning rate per layer, higher where the spectrum has a light tail (Zhou et al. 2023, arXiv:2312.00359).

    balance = TempBalance(model)
    optimizer = torch.optim.SGD(balance.groups(weight_decay=5e-4), lr=0.1, momentum=0.9)
    balance.watch(optimizer)                       # stock Trainer: optimizers=(optimizer, None), callbacks=[balance.callback()]
    for epoch in range(epochs):
        balance.update()
        ...                                        # the loop and the scheduler as they were

Parameters stay in their groups for good, so what the optimiser knows of each (momentum, moments) stays with it. A group's "lr" is the
scheduler's; it is multiplied for the step alone, so that every scheduler works, also those that go on from the last rate. FARMS
(ICML 2025) changes only the spectrum: `look=Look(Windows(100, 1.0, 9), "mid")`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, ModelError
from ..plan import Plan, Train
from ..scores import Look, layer_tail
from ..structure import Layer, in_order, module_of, parameter_of, structure_of

Map = Literal["linear", "sqrt", "log2", "rank"]
WHOLE = Look(
    None, "mid", fewest=50
)  # TempBalance's spectrum: whole matrices, the tail from the median, 50 eigenvalues at least


def learning_rates(
    alphas: Mapping[str, float], rate: float, low: float = 0.5, high: float = 1.5, map_by: Map = "linear"
) -> dict[str, float]:
    """Name -> learning rate, rising with alpha; `rate` is the global one, dimensionless alphas > 1.

    linear: from low * rate at the smallest alpha to high * rate at the largest. rank: the same range in even steps by rank, equal alphas
    in their order. sqrt, log2: proportional to that of alpha, their mean being rate. Alphas that are all equal get the rate itself.
    """
    if not 0 <= low <= high or not all(math.isfinite(alpha) and alpha > 1 for alpha in alphas.values()):
        raise ConfigError(
            f"learning_rates: low={low:g}, high={high:g}: give 0 <= low <= high, and finite alphas above 1."
        )
    if not alphas:
        return {}
    least, most = min(alphas.values()), max(alphas.values())
    if least == most:
        return dict.fromkeys(alphas, rate)
    if map_by in ("linear", "rank"):
        place = {name: (alpha - least) / (most - least) for name, alpha in alphas.items()}
        if map_by == "rank":
            place = {name: rank / (len(alphas) - 1) for rank, name in enumerate(sorted(alphas, key=alphas.__getitem__))}
        return {name: rate * (low + (high - low) * place[name]) for name in alphas}
    if map_by not in ("sqrt", "log2"):
        raise ConfigError(f'learning_rates: map_by="{map_by}": give linear, sqrt, log2 or rank.')
    value = math.sqrt if map_by == "sqrt" else math.log2
    mean = math.fsum(value(alpha) for alpha in alphas.values()) / len(alphas)
    return {name: rate * value(alpha) / mean for name, alpha in alphas.items()}


class TempBalance:
    """Learning rates by layer for one model. Default range: ResNet-34's, with the first and last layer left at the global rate.

    `factors`: layer -> what its learning rate is multiplied by, from the last `update`; `notes`: layers that had no alpha in it.
    """

    def __init__(
        self,
        model: nn.Module,
        low: float = 0.3,
        high: float = 1.7,
        *,
        look: Look = WHOLE,
        map_by: Map = "linear",
        ends: bool = False,
    ) -> None:
        """ends: tune the first and the last layer, too. Raises ModelError if no layer that is trained is left."""
        learning_rates({"a": 2.0, "b": 3.0}, 1.0, low, high, map_by)  # bad settings show now, not after an epoch
        self.model, self.low, self.high, self.look, self.map_by = model, low, high, look, map_by
        self.layers = _tuned(model, ends)
        self.alphas: dict[str, float] = {}
        self.factors: dict[str, float] = {}
        self.notes: tuple[str, ...] = ()
        self._scheduled: list[tuple[dict[str, Any], Any]] = []  # groups whose rate is multiplied at the moment

    def groups(self, weight_decay: float = 0.0, *, decay_all: bool = True) -> list[dict[str, Any]]:
        """Parameter groups with every trained parameter once: of each layer, under its name in "layer", and of the rest, under "".

        A layer's bias is with it, and a norm that has its name with bn for conv. decay_all=False: no decay of biases and norms, in
        groups of their own.
        """
        owner = {id(parameter): layer.name for layer in self.layers for parameter in self._followers(layer)}
        found: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                decayed = decay_all or parameter.ndim > 1
                found.setdefault((owner.get(id(parameter), ""), decayed), []).append(parameter)
        return [
            {"params": parameters, "layer": layer, "weight_decay": weight_decay if decayed else 0.0}
            for (layer, decayed), parameters in found.items()
        ]

    def update(self) -> dict[str, float]:
        """Measure every layer's alpha on the weights as they are, and set the factors. Call before each epoch. Returns the alphas."""
        self.alphas, notes = {}, []
        for layer in self.layers:
            tail = layer_tail(parameter_of(self.model, layer).detach(), layer, self.look)
            if tail.alpha is not None:
                self.alphas[layer.name] = tail.alpha
            if tail.note:
                notes.append(f"{layer.name}: {tail.note}")
        self.factors, self.notes = learning_rates(self.alphas, 1.0, self.low, self.high, self.map_by), tuple(notes)
        return self.alphas

    def plan(self) -> Plan:
        """The factors of the last `update` as a plan: `train: {rate: ...}` of each layer, beside its alpha. To look at, to compare over
        epochs, or to train with as they are: `parameter_groups(model, lr, rates=rates_of(plan))`."""
        settings = {"low": self.low, "high": self.high, "map_by": self.map_by}
        return Plan(
            method={"name": "temp-balance", **settings},
            layers={name: Train(rate=factor) for name, factor in self.factors.items()},
            scores=self.alphas,
            notes=self.notes,
        )

    def watch(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Multiply the learning rates for each step of this optimiser, until the handles are removed.

        Raises ConfigError unless it was made from `groups`.
        """
        layers = {group.get("layer") for group in optimizer.param_groups}
        absent = [layer.name for layer in self.layers if layer.name not in layers]
        if absent:
            raise ConfigError(
                f'the optimiser has no group for layer "{absent[0]}": make it from balance.groups(), and hand it to a Trainer by'
                " optimizers=(optimizer, None)."
            )
        return [
            optimizer.register_step_pre_hook(lambda one, *_: self._multiply(one)),
            optimizer.register_step_post_hook(lambda *_: self._restore()),
        ]

    def callback(self) -> Any:
        """For the stock transformers Trainer: updates before each epoch, watches the optimiser, stops watching at the end.

        Checkpoints hold the factors (in `trainer_state.json`), so that a run resumed within an epoch trains as it would have.
        """
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState

        balance = self

        class TempBalanceCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is not typed
            handles: tuple[RemovableHandle, ...] = ()
            epoch: int | None = None  # that the factors are of

            def state(self) -> dict[str, Any]:
                return {
                    "args": {},
                    "attributes": {"factors": balance.factors, "alphas": balance.alphas, "epoch": self.epoch},
                }

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.epoch = None
                stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
                if stored is not None:
                    held = stored["attributes"]
                    balance.factors, balance.alphas, self.epoch = held["factors"], held["alphas"], held["epoch"]
                optimizer = kwargs["optimizer"]
                self.handles = tuple(balance.watch(getattr(optimizer, "optimizer", optimizer)))  # accelerate wraps it

            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                epoch = int(state.epoch + 1e-6)
                if epoch != self.epoch:  # else it was resumed within this one
                    balance.update()
                    self.epoch = epoch

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                for handle in self.handles:
                    handle.remove()

        return TempBalanceCallback()

    def _followers(self, layer: Layer) -> list[nn.Parameter]:
        weight, module = parameter_of(self.model, layer), module_of(self.model, layer)
        if layer.kind == "experts":  # its module holds other layers, too
            return [weight]
        path = layer.parameter.rpartition(".")[0]
        modules = dict(self.model.named_modules())
        norms = [one for name, one in modules.items() if "bn" in name and name.replace("bn", "conv") == path]
        return [parameter for one in (module, *norms) for parameter in one.parameters(recurse=False)]

    def _multiply(self, optimizer: Optimizer) -> None:
        self._restore()  # a step that failed left its rates behind
        for group in optimizer.param_groups:
            factor = self.factors.get(group.get("layer", ""), 1.0)
            self._scheduled.append((group, group["lr"]))
            group["lr"] = group["lr"] * factor  # a new number: a scheduler may hold the tensor of the old one

    def _restore(self) -> None:
        for group, rate in self._scheduled:
            group["lr"] = rate
        self._scheduled = []


def _tuned(model: nn.Module, ends: bool) -> list[Layer]:
    """The trained linears, convolutions and experts in the order of the model; without `ends` no stem and no head, which are in no
    block (a language model's stem is a table, which is none of these, and so may its head be)."""
    every = in_order(model, structure_of(model, include=["*"]))
    layers = [layer for layer in every if layer.kind not in ("embedding", "table")]
    outer = [] if ends else [layer for layer in (*layers[:1], *layers[-1:]) if layer.block is None]
    found = [layer for layer in layers if layer not in outer and _trained(parameter_of(model, layer))]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: of its {len(layers)} linears and convolutions none is trained and neither first nor last."
            " Tune those, too: ends=True."
        )
    return found


def _trained(parameter: Tensor) -> bool:
    return parameter.requires_grad
