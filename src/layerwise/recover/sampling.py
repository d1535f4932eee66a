"""Training a few blocks at a time (LISA, arXiv:2403.17919; OwLore, arXiv:2405.18380): every `period` steps others, the rest frozen.

    sampling = LayerSampling(model, probabilities, blocks=5, period=50, low_rank=LowRank(128))
    optimizer = LowRankAdam(sampling.groups(lr=3e-4))  # before anything is frozen: it knows every parameter for good
    sampling.watch(optimizer)
    for step, batch in enumerate(data):
        sampling.at(step)  # before the forward pass of each step of the optimiser
        ...                # the loop as it was

In the stock Trainer the last three are `Trainer(..., optimizers=(optimizer, None), callbacks=[sampling.callback()])`.
A frozen block has no gradients, so neither memory for them nor a step; the backward pass still goes down to the lowest block that is
trained, always to the embeddings if these are. Without probabilities all blocks have the same: LISA. Departures from the official code:
D1 every activation gets a projector of its own gradients (there blocks come back to one that is up to two activations old). D2 what happens
to the optimiser's state of a block that leaves is said: see `state`. D3 a resumed run draws what it would have drawn, within a period too
(there all blocks stay trainable until the next one). D4 draws are keyed by seed and period: processes agree, global seeds stay.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, ModelError, PlanError, SelectionError
from ..settings import nearest
from ..structure import structure_of
from .draw import Draw, check_draw, drawn, normalised
from .groups import parameter_groups
from .low_rank import LowRank, LowRankAdam

State = Literal["keep", "reset", "offload"]


class LayerSampling:
    """Which blocks of one model are trained when. `active`: the names of those that are, in the order of the model.

    probabilities: block -> weight in the draw, scaled to sum 1; a block that is not named is never trained; None: all alike.
    blocks, draw, seed: see `draw`; with "independent", `blocks` is their mean number. period: steps of the optimiser from draw to draw.
    always: globs over the names of the parameters outside the blocks (embeddings, head, last norm): these are trained in every step, the
    others outside never. state: of the optimiser, of a block that leaves: "keep" (the memory grows until all were there), "reset" (its
    moments start anew: the first steps of an activation are long ones), "offload" (kept in the memory of the host); None: keep where
    low_rank, else reset. rates: see `parameter_groups`. Parameters that are frozen already are left alone.

    Raises ConfigError (settings), PlanError (probabilities of other blocks than the model's), SelectionError (a glob that matches nothing),
    ModelError (no blocks, nothing in them that can be trained).
    """

    def __init__(
        self,
        model: nn.Module,
        probabilities: Mapping[str, float] | None = None,
        *,
        blocks: int = 2,
        period: int = 20,
        draw: Draw = "exact",
        always: Sequence[str] = ("*",),
        low_rank: LowRank | None = None,
        state: State | None = None,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if period < 1:
            raise ConfigError(
                f"period={period}: give the steps of the optimiser from one draw to the next, at least 1."
            )
        if state not in (None, *get_args(State)):
            raise ConfigError(f'state="{state}": give keep, reset or offload.')
        self.model, self.period, self.seed, self.count, self.draw = model, period, seed, blocks, draw
        self.low_rank, self.rates = low_rank, dict(rates or {})
        self.state: State = state or ("keep" if low_rank else "reset")
        self._structure = structure_of(model, include=["*"])
        self._blocks = _trained(model, [block.name for block in self._structure.blocks])
        _check_names(model, [block.name for block in self._structure.blocks], probabilities)
        given = dict.fromkeys(self._blocks, 1.0) if probabilities is None else probabilities
        self.probabilities = normalised({name: given.get(name, 0.0) for name in self._blocks})
        check_draw(self.probabilities, blocks, draw)
        self._outside = _chosen(model, self._blocks, always)
        if draw == "independent" and not self._outside[True] and blocks * max(self.probabilities.values()) < 1:
            raise ConfigError(
                "draw=independent may draw no block, and nothing outside the blocks is trained (always): then there would be no gradient at"
                " all. Use draw=exact, or train something in every step."
            )
        self._always = tuple(always)
        self.step = 0
        self.active: tuple[str, ...] = ()
        self._index: int | None = None  # the period whose blocks are active
        self._optimizer: Optimizer | None = None

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups of every parameter that is ever trained, for the one optimiser of the run: see `parameter_groups`."""
        groups = parameter_groups(
            self.model,
            lr,
            weight_decay=weight_decay,
            rates=self.rates,
            low_rank=self.low_rank,
            structure=self._structure,
        )
        wanted = {id(parameter) for parameter in self._ever()}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in wanted]
        return [group for group in groups if group["params"]]

    def drawn(self, period: int) -> tuple[str, ...]:
        """The blocks of this period (0, 1, ...), in the order of the model; changes nothing."""
        chosen = drawn(self.probabilities, self.count, self.draw, self.seed, period)
        return tuple(name for name in self._blocks if name in chosen)

    def watch(self, optimizer: Optimizer) -> None:
        """Freeze what is not trained now, and keep the state of this optimiser in order from here on.

        Raises ConfigError if it lacks parameters that are trained some time, or does not project what should be.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if missing := [parameter for parameter in self._ever() if id(parameter) not in known]:
            raise ConfigError(
                f"the optimiser lacks {len(missing)} parameters that this run trains some time: make it from sampling.groups(...), before"
                " anything is frozen, and hand it to a Trainer by optimizers=(optimizer, None)."
            )
        if self.low_rank is not None and not isinstance(optimizer, LowRankAdam):
            raise ConfigError(
                f"{type(optimizer).__name__} does not project gradients: use LowRankAdam, or low_rank=None."
            )
        self._optimizer = optimizer
        if self._index is None:
            self.at(self.step)
        else:  # the checkpoint's blocks, as they were
            self._freeze()
            self._move_away([name for name in self._blocks if name not in self.active])

    def at(self, step: int) -> None:
        """Before the forward pass of step 0, 1, ... of the optimiser: in the first of a period, other blocks. Again does nothing."""
        if self._optimizer is None:
            raise ConfigError("sampling.watch(optimizer) comes first: leaving blocks are told to it.")
        self.step = step
        if step // self.period == self._index:
            return
        self._index = step // self.period
        before, self.active = self.active, self.drawn(self._index)
        self._freeze()
        left = [name for name in before if name not in self.active]
        if self.state == "reset":
            for parameter in self._of(left):
                self._optimizer.state.pop(parameter, None)
        self._move_away(left)
        for parameter in self._of(self.active):
            _move(self._optimizer.state.get(parameter, {}), parameter.device)
            if isinstance(self._optimizer, LowRankAdam):
                self._optimizer.refresh(parameter)

    def release(self) -> None:
        """Thaw everything that was not frozen before, and bring the optimiser's state back to the device."""
        for parameter in (*self._of(self._blocks), *(one for ones in self._outside.values() for one in ones)):
            parameter.requires_grad_()
            if self._optimizer is not None:
                _move(self._optimizer.state.get(parameter, {}), parameter.device)
        self._optimizer = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the step, the blocks, and every setting. Save it beside the optimiser's."""
        settings = {
            "blocks": self.count,
            "period": self.period,
            "draw": self.draw,
            "always": list(self._always),
            "state": self.state,
            "seed": self.seed,
            "low_rank": None if self.low_rank is None else vars(self.low_rank).copy(),
            "rates": dict(self.rates),
            "probabilities": dict(self.probabilities),
        }
        return {"step": self.step, "period": self._index, "active": list(self.active), "settings": settings}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where a run was. Raises ConfigError, showing every difference, if that one had other settings."""
        mine = self.state_dict()["settings"]
        if differing := _differences(saved["settings"], mine):
            raise ConfigError(
                "the checkpoint was trained with other settings: " + "; ".join(differing) + ". Use its own."
            )
        if saved["period"] is not None and list(self.drawn(saved["period"])) != list(saved["active"]):
            raise ConfigError(
                f"the checkpoint was training {', '.join(saved['active'])} where this run draws {', '.join(self.drawn(saved['period']))}:"
                " another version of torch or layerwise. It cannot be resumed exactly."
            )
        self.step, self._index, self.active = int(saved["step"]), saved["period"], tuple(saved["active"])
        if self._optimizer is not None:
            self.watch(self._optimizer)

    def callback(self) -> Any:
        """A `TrainerCallback` for the stock transformers Trainer: see `recover.sampling_trainer`."""
        from .sampling_trainer import callback_of

        return callback_of(self)

    def holds_in(self, model: nn.Module) -> bool:
        """Whether the parameters are still this model's own, not shards or copies of them."""
        own = {id(parameter) for parameter in model.parameters()}
        return all(id(parameter) in own for parameter in self._ever())

    def _of(self, names: Iterable[str]) -> list[nn.Parameter]:
        return [parameter for name in names for parameter in self._blocks[name]]

    def _ever(self) -> list[nn.Parameter]:
        """Every parameter that is trained some time."""
        return [*self._of([n for n, value in self.probabilities.items() if value > 0]), *self._outside[True]]

    def _freeze(self) -> None:
        for name, parameters in self._blocks.items():
            for parameter in parameters:
                _train(parameter, name in self.active)
        for on, parameters in self._outside.items():
            for parameter in parameters:
                _train(parameter, on)

    def _move_away(self, names: Sequence[str]) -> None:
        if self.state == "offload" and self._optimizer is not None:
            for parameter in self._of(names):
                _move(self._optimizer.state.get(parameter, {}), torch.device("cpu"))


def _train(parameter: nn.Parameter, on: bool) -> None:
    parameter.requires_grad_(on)
    if not on:
        parameter.grad = None


def _move(state: dict[str, Any], device: torch.device) -> None:
    """Moments and projectors; torch keeps its counters where it wants them."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            state[key] = value.to(device)


def _trained(model: nn.Module, names: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Block -> its trained parameters, each under the first block that has it; blocks without any are left out."""
    if not names:
        raise ModelError(f"{type(model).__name__} has no repeated blocks to draw from.")
    seen: set[int] = set()
    found: dict[str, list[nn.Parameter]] = {}
    for name in names:
        own = [one for one in model.get_submodule(name).parameters() if one.requires_grad and id(one) not in seen]
        seen |= {id(one) for one in own}
        if own:
            found[name] = own
    if not found:
        raise ModelError(
            f"{type(model).__name__}: none of its {len(names)} blocks has a parameter that is trained. Thaw them (requires_grad), or give"
            " the model in floating point."
        )
    return found


def _check_names(model: nn.Module, names: Sequence[str], probabilities: Mapping[str, float] | None) -> None:
    unknown = [name for name in probabilities or {} if name not in names]
    if unknown:
        raise PlanError(
            [
                f'probability of "{name}": {type(model).__name__} has no block of this name.{nearest(name, names)}'
                for name in unknown
            ]
        )


def _chosen(
    model: nn.Module, blocks: Mapping[str, Sequence[nn.Parameter]], always: Sequence[str]
) -> dict[bool, list[nn.Parameter]]:
    """Trained parameters outside the blocks: True -> those that a glob matches under any of their names, False -> the others."""
    inside = {id(one) for some in blocks.values() for one in some}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and id(parameter) not in inside:
            names.setdefault(parameter, []).append(name)
    every = [name for some in names.values() for name in some]
    for glob in always:
        if glob != "*" and not any(fnmatchcase(name, glob) for name in every):
            raise SelectionError(
                f'always="{glob}" matches none of the {len(every)} parameters outside the blocks: {", ".join(every[:5])}.'
            )
    found: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter, some in names.items():
        found[any(fnmatchcase(name, glob) for name in some for glob in always)].append(parameter)
    return found


def _differences(saved: Mapping[str, Any], mine: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in {**saved, **mine}:
        one, two = saved.get(key), mine.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += _differences(one, two, f"{prefix}{key}.")
        elif one != two:
            found.append(f"{prefix}{key} was {one}, is {two}")
    return found
