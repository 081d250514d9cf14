"""The hook for anyone's training loop: a proximal step after each optimizer step, so that zeros are exact zeros."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from sparsekit.errors import InputError, TrainingError
from sparsekit.options import Penalty, Quantity
from sparsekit.selection.importance import filter_norms
from sparsekit.sparsify.channel_vectors import Largest
from sparsekit.sparsify.penalised_weights import GroupRates, PenalisedWeights, takes_plain_steps
from sparsekit.sparsify.revival import Revival
from sparsekit.sparsify.steering import Decision, Steering
from sparsekit.sparsify.strength import AutoStrength, ConstantStrength, Strength, as_strength
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks, Scores

# The channels that are held back are not halved for ever: below this they would be zero one day.
_NEARLY_NOTHING = 1e-8


class Sparsifier:
    """Shrinks whole coupled channels (or single weights) to exact zeros while a model trains.

    Call `step(optimizer)` after every `optimizer.step()`, or `attach(optimizer)` once. `model` may be wrapped by
    torch.compile or DistributedDataParallel. `penalty` says which weights are shrunk and how (`penalties` has the
    table); `strength` is a number, a `ConstantStrength`, or an `AutoStrength` with its target. In each step the
    threshold of channel g is

        t_g = rate x strength x factor(progress) x w_g

    `rate` is the optimizer's learning rate of the penalised weights (the mean over their tensors), for SGD times (1 -
    dampening) / (1 - momentum), the length of a steady step. For Adam and its kin it is taken as it is, which is
    decoupled shrinkage like AdamW's decay. `factor` is 1 or follows the parts of the phase (`PhaseShares`). The
    multiplier w_g is, at a constant strength, the square root of the number of penalised weights (1 for "l1" and
    "scale_l1"); with `adaptive` > 0

        w_g = mean norm x clamp((mean filter norm / filter norm of g) ^ adaptive, 0.05, 20)

    with norms at the start and means over the channel's group; and with costs times sqrt(cost / mean cost). At an
    automatic strength it is what `Steering` decides.

    Zeros stay zeros: once all penalised weights of a channel are 0 they are held there and their momenta cleared
    ("scale_l1" then holds the norm's shift at 0 too), unless `ConstantStrength.revive` lets them come back. As many
    channels of each group as its rounding keeps at least lose at most half of what is left of them in a step, those
    furthest from zero: no layer dies out (`min_channels` = 0 turns that off). Weights that are zero before any penalty
    acted are not held. Only groups whose penalised weights all require gradients, and are all in the optimizer, are
    penalised.

    Raises InputError for an unknown penalty, an automatic strength with "group_mcp", a target out of reach, groups of
    another model, or groups with nothing free.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        penalty: Penalty = "group_lasso",
        *,
        strength: Strength,
    ) -> None:
        strength = as_strength(strength)
        _check_penalty(penalty, strength)
        model = _unwrapped(model)
        self._groups = groups
        self._penalised = PenalisedWeights(model, groups, penalty)
        self._total_steps, self._shares = strength.total_steps, strength.phase
        self._strength = 0.0
        self._steps = 0
        self._met = False
        self._warned = False
        # Over channels everything is one vector (n,), in the order of `PenalisedWeights.numbers`.
        self._alive = torch.ones_like(self._penalised.norms())
        self._least = [_least_alive(group, groups) for group in self._penalised.groups]
        self._best = (
            Largest(self._penalised.numbers, self._least, self._penalised.device)
            if any(self._least)
            else None
        )
        self._rates = GroupRates(self._penalised)
        self._acted = False
        self._revival: Revival | None = None
        self._steering: Steering | None = None
        costs = _relative_costs(self._penalised.groups, strength.costs)
        if isinstance(strength, AutoStrength):
            self._multipliers = torch.zeros_like(self._alive)
            self._steering = Steering(model, groups, self._penalised, strength, costs)
        else:
            self._strength = float(strength.value)
            self._multipliers = self._constant_multipliers(model, strength.adaptive, costs)
            if strength.revive:
                self._revival = Revival(self._penalised.shrunk, self._penalised.tensors, penalty)

    @property
    def strength(self) -> float:
        """The strength that the last step used, schedule included; 0 before the first."""
        return self._current_strength(self._steps - 1) if self._steps else 0.0

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Shrink once. Call right after `optimizer.step()` (after unscaling and clipping, once per update).

        Raises InputError if the optimizer has none of the penalised weights.
        """
        rates = self._rates.of(optimizer)
        if self._steering is not None and not self._met:
            self._steering.observe(self._steps)
            self._follow(self._steering.decide(self._steps, self._alive, rates))
        strength, rate = self._current_strength(self._steps), self._rates.by_channel(rates)
        self._steps += 1
        if self._revival is not None and strength > 0:
            self._revival.observe()
            pulls = self._revival.of_channels(relative=not takes_plain_steps(optimizer))
            self._alive.masked_fill_(pulls > strength * self._multipliers, 1.0)
        factors = self._alive
        if strength > 0 and (isinstance(rate, Tensor) or rate > 0):
            self._acted = True
            distances = self._penalised.distances()
            thresholds = self._thresholds(rate * strength, distances)
            factors = self._penalised.shrink_(thresholds, distances, self._alive, rate)
        if self._acted:  # before that nothing has died
            self._penalised.hold_(factors)
            if self._revival is None or strength == 0:  # what may come back goes on from its momenta
                self._penalised.clear_momenta_(optimizer, self._alive)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Take a step after every `optimizer.step()` from now on, in whoever's loop; `remove()` the handle to stop.

        Updates that a gradient scaler skips are skipped here too. Do not call `step` yourself then.
        """
        return optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self.step(optimizer))

    @torch.no_grad()
    def check_processes(self) -> None:
        """See that all processes of a distributed run hold the same zeros; does nothing in a single one.

        Every process has to call it, and waits for the others. Raises TrainingError if they differ: then the weights
        do as well, and the processes no longer train one model.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        least, most = self._alive.clone(), self._alive.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise TrainingError(
                f"the processes disagree on {int((least != most).sum())} channels that are zero; give every process "
                "the same model at the start, and average gradients or weights in every step "
                "(DistributedDataParallel)"
            )

    @torch.no_grad()
    def project_(self, model: nn.Module) -> None:
        """Set the held zeros to zero in a copy of the model, for instance an average of its weights over time."""
        tensors = dict(_unwrapped(model).named_parameters())
        self._penalised.hold_(self._alive, tensors)

    def importance(self) -> Scores:
        """With an automatic strength, how important the channels of each free group are by now; >= 0, comparable.

        On the CPU. Infinite for groups that the penalty does not act on: they stay. For `choose_channels` and
        `search_speed`, whose masks `settle` takes. Waits for the device. Raises InputError at a constant strength.
        """
        learned = self._steered().importance(self._alive)
        return {g.name: learned.get(g.name, torch.full((g.n_channels,), math.inf)) for g in self._groups.free}

    def expected_masks(self) -> Masks:
        """With an automatic strength, keep-masks of what would be left if the phase ended as it is decided now.

        Cut a copy of the model by them to see, early in a phase, how fast the outcome will be. Waits for the device.
        Raises InputError at a constant strength.
        """
        return self._steered().expected_masks(self._alive)

    def retarget(self, target: Mapping[Quantity, float]) -> None:
        """With an automatic strength, go for another share of the same quantity from the next decision on.

        Raises InputError at a constant strength, for another quantity, or for a share that is out of reach.
        """
        self._steered().retarget(target, self._alive)
        self._met = False

    def settle(self, masks: Masks) -> None:
        """With an automatic strength, let exactly the channels die that keep-masks drop, and choose no others.

        For an outcome that was cut and timed before it was trained: `expected_masks`, perhaps with some entries
        changed, to `make_plan` and `apply_plan`, and here what was fast enough. The target becomes what the masks
        leave. Raises InputError at a constant strength, or for masks of other groups.
        """
        self._steered().settle(masks)
        self._met = False

    def shortfall(self) -> str:
        """How far from its target the phase is; "" once it is met, or without one.

        Waits for the device.
        """
        return "" if self._steering is None else self._steering.shortfall(self._alive)

    def progress(self) -> dict[str, float]:
        """`zero_share`: fraction of penalised channels that are exactly zero; `strength`: as used last.

        Waits for the device, so not for every step.
        """
        alive = self._alive.cpu()
        if self._steering is None:
            self._warn_if_absurd(self._penalised.numbers.split(alive))
        return {"zero_share": float((alive == 0).float().mean()), "strength": self.strength}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to be the same run, as plain numbers and tensors."""
        split = self._penalised.numbers.split
        return {
            "steps": self._steps,
            "strength": self._strength,
            "met": self._met,
            "alive": split(self._alive.clone()),
            "multipliers": split(self._multipliers.clone()),
            "steering": {} if self._steering is None else self._steering.state_dict(),
            "revival": {} if self._revival is None else self._revival.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises InputError if it was taken from a model with other groups."""
        numbers = self._penalised.numbers
        sizes = dict(zip(numbers.names, numbers.sizes, strict=True))
        if {name: len(alive) for name, alive in state["alive"].items()} != sizes:
            raise InputError("the sparsifier's state belongs to a model with other channel groups")
        if bool(state["steering"]) != (self._steering is not None):
            raise InputError(
                "the sparsifier's state belongs to one with an automatic strength, or this one has one and it had none"
            )
        if bool(state.get("revival")) != (self._revival is not None):
            raise InputError(
                "the sparsifier's state belongs to one that revives channels, or this one does and it did not"
            )
        self._steps, self._strength, self._met = state["steps"], state["strength"], state["met"]
        self._alive.copy_(numbers.join(state["alive"]))
        self._multipliers.copy_(numbers.join(state["multipliers"]))
        self._acted = True
        if self._steering is not None:
            self._steering.load_state_dict(state["steering"])
        if self._revival is not None:
            self._revival.load_state_dict(state["revival"])

    @torch.no_grad()
    def _constant_multipliers(self, model: nn.Module, adaptive: float, costs: Mapping[str, float]) -> Tensor:
        split, norms = self._penalised.numbers.split, self._penalised.norms()
        multipliers = self._penalised.root_sizes()
        if adaptive > 0:
            of_filters = filter_norms(model, self._groups)
            of_group, norms_of_group = split(multipliers), split(norms)
            for name, values in of_group.items():
                # What has no filters is compared by its penalised weights.
                own = of_filters[name].to(norms) if of_filters[name].any() else norms_of_group[name]
                relative = (own.mean() / own.clamp_min(1e-12)).pow(adaptive).clamp(0.05, 20)
                values.copy_(norms_of_group[name].mean() * relative)
        return multipliers * self._penalised.numbers.join(costs).to(norms).sqrt()

    def _follow(self, decision: Decision | None) -> None:
        if decision is not None:
            self._strength, self._met = decision.strength, decision.met
            self._multipliers.copy_(decision.multipliers)

    def _current_strength(self, step: int) -> float:
        return self._strength * (self._shares.factor(step / self._total_steps) if self._total_steps else 1.0)

    def _thresholds(self, step_length: Tensor | float, distances: Tensor) -> Tensor:
        """The channels' thresholds in this step; those of the channels that have to stay cannot take them to zero."""
        thresholds = self._multipliers * step_length
        if self._best is None:
            return thresholds
        best = self._best(torch.where(self._multipliers > 0, distances, torch.inf))
        most = torch.where(distances > _NEARLY_NOTHING, distances / 2, 0.0)
        spared = torch.zeros(len(distances) + 1, dtype=torch.bool, device=distances.device)
        spared.index_fill_(0, best, True)
        return torch.where(spared[:-1], torch.minimum(thresholds, most), thresholds)

    def _steered(self) -> Steering:
        if self._steering is None:
            raise InputError("a penalty of constant strength has no target; give strength=AutoStrength(...)")
        return self._steering

    def _warn_if_absurd(self, alive: Mapping[str, Tensor]) -> None:
        """Say so, once, if a constant strength has taken all to zero that it could."""
        if self._warned or any(int(a.sum()) > n for a, n in zip(alive.values(), self._least, strict=True)):
            return
        self._warned = True
        warnings.warn(
            f"after {self._steps} steps the strength of {self._strength:.3g} has taken every channel to zero, except "
            "for those of each group that are held back; take a far smaller one, or an AutoStrength with a target",
            stacklevel=3,
        )


def _check_penalty(penalty: str, strength: ConstantStrength | AutoStrength) -> None:
    if penalty not in get_args(Penalty):
        raise InputError(f"penalty must be one of {', '.join(get_args(Penalty))}, got {penalty!r}")
    if penalty == "group_mcp" and isinstance(strength, AutoStrength):
        raise InputError(
            "penalty 'group_mcp' spares what is far from zero, so an automatic strength cannot take it there; it "
            "shrinks no channel that is to stay, so take 'group_lasso', or give a strength"
        )


def _least_alive(group: ChannelGroup, groups: ChannelGroups) -> int:
    """How many channels of a group the penalty may not take to zero."""
    return 0 if group.bypass or groups.min_channels == 0 else min(group.rounding.least, group.n_channels)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _relative_costs(groups: Sequence[ChannelGroup], costs: Mapping[str, float] | None) -> dict[str, float]:
    """Cost / mean cost of a channel, in [1/400, 400] but for whole blocks; 1 without costs.

    Raises InputError for impossible ones.
    """
    if costs is None:
        return {group.name: 1.0 for group in groups}
    for group in groups:
        if not 0 <= costs.get(group.name, -1.0) < math.inf:
            raise InputError(
                f"costs must have a number >= 0 for every group, got {costs.get(group.name)} for {group.name}; "
                "see sparsekit.channel_macs"
            )
    mean = sum(costs[g.name] * g.n_channels for g in groups) / sum(g.n_channels for g in groups)
    most = {group.name: math.inf if group.bypass else 400.0 for group in groups}
    return {g.name: min(max(costs[g.name] / mean, 1 / 400), most[g.name]) if mean else 1.0 for g in groups}
