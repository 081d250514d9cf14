"""The Sparsifier, for any training loop: a proximal step after each optimizer step makes exact zeros."""

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

# Below this distance a channel that has to stay is not halved any more, or it would underflow to zero.
_NEARLY_NOTHING = 1e-8


class Sparsifier:
    """Shrinks whole coupled channels (or single weights) to exact zeros while a model trains.

    Call `step(optimizer)` after every `optimizer.step()`, or `attach(optimizer)` once. `model` may be wrapped by
    torch.compile or DistributedDataParallel. `penalty` says which weights are shrunk and how (`penalties` has the
    table); `strength` is a number, a `ConstantStrength`, or an `AutoStrength` with its target. In each step the
    threshold of channel g is

        t_g = rate x strength x factor(progress) x w_g

    `rate` is the optimizer's learning rate of the penalised weights, the mean over their tensors. For SGD it is
    multiplied by (1 - dampening) / (1 - momentum), the length of a steady step. `factor` follows the parts of the phase
    (`PhaseShares`). At an automatic strength `Steering` decides the multiplier w_g. At a constant one it is the square
    root of the number of penalised weights (1 for "l1" and "scale_l1"), or with `adaptive` > 0

        w_g = mean norm x clamp((mean filter norm / filter norm of g) ^ adaptive, 0.05, 20)

    with norms at the start and means over the channel's group. With costs it is multiplied by sqrt(cost / mean cost).

    Zeros stay zeros: once all penalised weights of a channel are 0 they are held there and their momenta are cleared,
    unless `ConstantStrength.revive` lets them come back. "scale_l1" then holds the norm's shift at 0 too. Weights that
    are zero before any penalty acted are not held.

    No layer dies out: of each group the channels furthest from zero, as many as its rounding keeps at least, lose at
    most half of their distance in a step (`min_channels` = 0 turns that off). Groups are penalised only if all their
    penalised weights require gradients and are in the optimizer.

    Raises InputError for an unknown penalty, an automatic strength with "group_mcp", a target out of reach, groups of
    another model, or groups of which none is free.
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
        # Everything over channels is one vector (n,), in the order of `PenalisedWeights.numbers`.
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
        """The strength that the last step used, with the factor of the phase; 0 before the first step."""
        return self._current_strength(self._steps - 1) if self._steps else 0.0

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one proximal step. Call it right after every `optimizer.step()`.

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
        if self._acted:  # nothing has died before
            self._penalised.hold_(factors)
            if self._revival is None or strength == 0:  # a channel that may come back keeps its momenta
                self._penalised.clear_momenta_(optimizer, self._alive)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Take a step after every `optimizer.step()` from now on. `remove()` the handle to stop.

        Steps that a gradient scaler skips are skipped here too. Do not call `step` yourself then.
        """
        return optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self.step(optimizer))

    @torch.no_grad()
    def check_processes(self) -> None:
        """Check that all processes of a distributed run hold the same zeros. A single process does nothing.

        Every process has to call it, and waits for the others. Raises TrainingError if they differ: then the weights
        differ too, and the processes no longer train one model.
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
        """Set the held zeros to zero in a copy of the model, such as an average of its weights over time."""
        tensors = dict(_unwrapped(model).named_parameters())
        self._penalised.hold_(self._alive, tensors)

    def importance(self) -> Scores:
        """Return the importance (n_channels,) of each free group's channels so far, comparable across groups.

        It is on the CPU, and infinite for groups that the penalty does not act on: they stay. `choose_channels` and
        `search_speed` take it, and `settle` takes their masks. Waits for the device. Raises InputError at a constant
        strength.
        """
        learned = self._steered().importance(self._alive)
        return {g.name: learned.get(g.name, torch.full((g.n_channels,), math.inf)) for g in self._groups.free}

    def expected_masks(self) -> Masks:
        """Return keep-masks of what would be left if the phase ended as it is decided now.

        A copy of the model that is cut by them shows early in a phase how fast the result will be. Waits for the
        device. Raises InputError at a constant strength.
        """
        return self._steered().expected_masks(self._alive)

    def retarget(self, target: Mapping[Quantity, float]) -> None:
        """Aim for another share of the same quantity from the next decision on.

        Raises InputError at a constant strength, for another quantity, or for a share that is out of reach.
        """
        self._steered().retarget(target, self._alive)
        self._met = False

    def settle(self, masks: Masks) -> None:
        """Shrink exactly the channels that the keep-masks drop, and choose no others from now on.

        So a result can be cut and timed before it is trained: by the masks of `expected_masks` or `search_speed`, which
        are then given here. The target becomes what the masks leave. Raises InputError at a constant strength, or for
        masks of other groups.
        """
        self._steered().settle(masks)
        self._met = False

    def shortfall(self) -> str:
        """Say how far from its target the phase is; "" once it is met, or without a target.

        Waits for the device.
        """
        return "" if self._steering is None else self._steering.shortfall(self._alive)

    def progress(self) -> dict[str, float]:
        """Return `zero_share`, the fraction of penalised channels at zero, and the last `strength`.

        It waits for the device, so do not call it in every step.
        """
        alive = self._alive.cpu()
        if self._steering is None:
            self._warn_if_absurd(self._penalised.numbers.split(alive))
        return {"zero_share": float((alive == 0).float().mean()), "strength": self.strength}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain numbers and tensors."""
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
        """Take the state that `state_dict` returned. Raises InputError for the state of another Sparsifier."""
        numbers = self._penalised.numbers
        sizes = dict(zip(numbers.names, numbers.sizes, strict=True))
        if {name: len(alive) for name, alive in state["alive"].items()} != sizes:
            raise InputError(
                "the state is of a Sparsifier for other channel groups; give the groups that it was made with"
            )
        if bool(state["steering"]) != (self._steering is not None):
            raise InputError(
                "the state and this Sparsifier must both have an automatic strength, or neither; give the same strength"
            )
        if bool(state.get("revival")) != (self._revival is not None):
            raise InputError(
                "only one of the state and this Sparsifier revives channels; give the same `revive`"
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
                # Channels without filters are compared by their penalised weights.
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
        """Return the thresholds of this step. Those of channels that have to stay cannot take them to zero."""
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
        """Warn once if a constant strength has taken every channel to zero that it could."""
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
    """Count the channels of a group that the penalty may not take to zero."""
    return 0 if group.bypass or groups.min_channels == 0 else min(group.rounding.least, group.n_channels)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _relative_costs(groups: Sequence[ChannelGroup], costs: Mapping[str, float] | None) -> dict[str, float]:
    """Return cost / mean cost of a channel, in [1/400, 400]; 1 without costs. Residual blocks have no upper limit.

    Raises InputError for costs that are missing, negative or not finite.
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
