"""The hook for anyone's training loop: a proximal step after each optimizer step, so that zeros are exact zeros."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from sparsekit.errors import InputError, TrainingError
from sparsekit.options import Importance, Penalty, Quantity
from sparsekit.selection.importance import channel_scores
from sparsekit.selection.keep_masks import check_target
from sparsekit.sparsify.channel_vectors import Largest
from sparsekit.sparsify.penalised_weights import GroupRates, PenalisedWeights, takes_plain_steps
from sparsekit.sparsify.revival import Pull
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.sparsify.steering import Controller, Decision
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks

# The channels that are held back are not halved for ever: below this they would be zero one day.
_NEARLY_NOTHING = 1e-8


class Sparsifier:
    """Shrinks whole coupled channels (or single weights) to exact zeros while a model trains.

    `penalty` says which weights and how: see `penalties`, whose table has all of them.

    Call `step(optimizer)` after every `optimizer.step()`, or `attach(optimizer)` once. `model` may be wrapped by
    torch.compile or DistributedDataParallel. The threshold of channel g is

        t_g = rate x strength x factor(progress) x w_g

    with w_g = sqrt(p_g), p_g its number of penalised weights (w_g = 1 for "l1" and "scale_l1"), and `rate` the
    optimizer's current learning rate of those weights (the mean over their tensors), for SGD times (1 - dampening)
    / (1 - momentum): torch does not dampen momentum unless asked to, so a steady step is that much longer. For Adam and
    its kin the rate is taken as it is, which is decoupled shrinkage like AdamW's decay: a fixed point has mean
    gradient = -strength x (root mean square of the gradient), coordinate by coordinate.

    `strength` is the coefficient, or "auto": then blocks of `round_to` channels are chosen whose removal leaves the
    share `target` ({"macs": 0.5}: half of the multiply-accumulates), those that are worth least for their cost, and
    only they are shrunk, evenly, so that they are zero by the end of the penalised part (`Controller`, which plans that
    anew a hundred times). What channels are worth is, by `importance`, "taylor": their effect on the loss, learned from
    the gradients, so `step` has to come before `zero_grad`; or "magnitude": their filters' size at the start. Once the
    target is met the strength is 0 and the zeros are held; `shortfall` tells if it is not. "auto" needs `total_steps`
    and `target`. With `total_steps` the phase has the parts of `shares`; without, the strength is constant.

    Zeros stay zeros: once all penalised weights of a channel are 0 they are held there and their momenta
    cleared, so neither momentum nor gradient brings them back ("scale_l1" then holds the norm's shift at 0 too).
    The `min_channels` channels of each group that are furthest from zero lose at most half of what is left of them in
    a step: no layer dies out. `min_channels` = 0 turns that off. Weights that are zero before any penalty acted (timm
    initialises some BatchNorm scales so) are not held. Only groups whose penalised weights all require
    gradients, and are all in the optimizer, are penalised. At a constant strength, with `adaptive` > 0 (adaptive lasso,
    Zou 2006)

        w_g = mean norm x clamp((mean score / score_g) ^ adaptive, 0.05, 20)

    takes that place, with norms and scores at the start and means over the channel's group: weak channels fall early
    and one after another, strong ones are shrunk less, and every group is shrunk at the same relative pace. `costs`
    (what one channel of each group costs: `channel_macs`, `channel_latencies`) make zeros appear where they save most:
    by them "auto" divides what channels are worth; a constant strength is multiplied by sqrt(cost / mean cost).

    With `revive` zeros of a constant strength are not for good: a channel that fell early, or in a noisy step, comes
    back when the loss pulls at it harder than the penalty holds it there, which is that zero is not its optimum
    (`Pull`). The momenta of channels at zero are kept until the penalised part is over, gradients are needed as for
    "taylor", and a step costs some passes over the penalised weights more. Behind BatchNorm and ReLU nothing comes
    back: with scale and shift at zero there is no gradient.

    Raises InputError for a strength below 0, "auto" without total_steps or target or with "group_mcp" or `revive`, a
    target out of reach, groups of another model, or groups with nothing free.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        penalty: Penalty = "group_lasso",
        strength: float | Literal["auto"] = 1e-3,
        total_steps: int | None = None,
        shares: PhaseShares | None = None,
        target: Mapping[Quantity, float] | None = None,
        round_to: int = 1,
        min_channels: int = 1,
        adaptive: float = 0.0,
        importance: Importance = "taylor",
        costs: Mapping[str, float] | None = None,
        revive: bool = False,
    ) -> None:
        _check_arguments(penalty, strength, total_steps, target, round_to, importance, revive)
        check_target(groups, target)
        model = _unwrapped(model)
        self._groups = groups
        self._penalised = PenalisedWeights(model, groups, penalty)
        self._total_steps = total_steps
        self._shares = shares or (PhaseShares() if total_steps else PhaseShares(0.0, 0.0, 0.0))
        self._strength = 0.0 if strength == "auto" else float(strength)
        self._steps = 0
        self._met = False
        self._warned = False
        # Over channels everything is one vector (n,), in the order of `PenalisedWeights.numbers`.
        self._alive = torch.ones_like(self._penalised.norms())
        relative_costs = _relative_costs(self._penalised.groups, costs)
        self._weights = self._channel_weights(model, adaptive, relative_costs)
        self._least = [
            0 if g.bypass else min(g.units(min_channels), g.n_channels) for g in self._penalised.groups
        ]
        self._best = (
            Largest(self._penalised.numbers, self._least, self._penalised.device)
            if any(self._least)
            else None
        )
        self._rates = GroupRates(self._penalised)
        self._pull = Pull(self._penalised.shrunk, self._penalised.tensors, penalty) if revive else None
        self._acted = False
        self._controller: Controller | None = None
        if strength == "auto":
            assert target
            assert total_steps
            self._controller = Controller(
                model,
                groups,
                self._penalised,
                target=target,
                rounding={group.name: group.rounding(round_to, min_channels) for group in groups.free},
                costs=relative_costs,
                importance=importance,
                first=total_steps * self._shares.warmup,
                length=total_steps * (1 - self._shares.debias - self._shares.warmup),
            )

    @torch.no_grad()
    def _channel_weights(
        self, model: nn.Module, adaptive: float, relative_costs: Mapping[str, float]
    ) -> Tensor:
        split, norms = self._penalised.numbers.split, self._penalised.norms()
        weights = self._penalised.root_sizes()
        if adaptive > 0:
            scores = channel_scores(model, self._groups)
            of_group, norms_of_group = split(weights), split(norms)
            for name, values in of_group.items():
                # What has no filters to score is compared by its norms.
                score = scores[name].to(norms) if scores[name].any() else norms_of_group[name]
                relative = (score.mean() / score.clamp_min(1e-12)).pow(adaptive).clamp(0.05, 20)
                values.copy_(norms_of_group[name].mean() * relative)
        return weights * self._penalised.numbers.join(relative_costs).to(norms).sqrt()

    @property
    def strength(self) -> float:
        """The strength that the last step used, schedule included; 0 before the first."""
        return self._current_strength(self._steps - 1) if self._steps else 0.0

    def _current_strength(self, step: int) -> float:
        return self._strength * (self._shares.factor(step / self._total_steps) if self._total_steps else 1.0)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Shrink once. Call right after `optimizer.step()` (after unscaling and clipping, once per update).

        Raises InputError if the optimizer has none of the penalised weights.
        """
        rates = self._rates.of(optimizer)
        if self._controller is not None and not self._met:
            self._controller.observe(self._steps)
            self._follow(self._controller.decide(self._steps, self._alive, rates))
        strength, rate = self._current_strength(self._steps), self._rates.by_channel(rates)
        self._steps += 1
        if self._pull is not None and strength > 0:
            self._pull.observe()
            pulls = self._pull.of_channels(relative=not takes_plain_steps(optimizer))
            self._alive.masked_fill_(pulls > strength * self._weights, 1.0)
        factors = self._alive
        if strength > 0 and (isinstance(rate, Tensor) or rate > 0):
            self._acted = True
            reach = self._penalised.reach()
            thresholds = self._thresholds(rate * strength, reach)
            factors = self._penalised.shrink_(thresholds, reach, self._alive, rate)
        if self._acted:  # before that nothing has died
            self._penalised.hold_(factors)
            if self._pull is None or strength == 0:  # what may come back goes on from its momenta
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

    def _thresholds(self, step_length: Tensor | float, reach: Tensor) -> Tensor:
        """The channels' thresholds in this step; those of the best `min_channels` cannot take them to zero."""
        thresholds = self._weights * step_length
        if self._best is None:
            return thresholds
        best = self._best(torch.where(self._weights > 0, reach, torch.inf))
        most = torch.where(reach > _NEARLY_NOTHING, reach / 2, 0.0)
        spared = torch.zeros(len(reach) + 1, dtype=torch.bool, device=reach.device)
        spared.index_fill_(0, best, True)
        return torch.where(spared[:-1], torch.minimum(thresholds, most), thresholds)

    def _warn_if_absurd(self, alive: Mapping[str, Tensor]) -> None:
        """Say so, once, if a constant strength has taken all to zero that it could."""
        if self._warned or any(int(a.sum()) > n for a, n in zip(alive.values(), self._least, strict=True)):
            return
        self._warned = True
        warnings.warn(
            f"after {self._steps} steps the strength of {self._strength:.3g} has taken every channel to zero, except "
            "for the min_channels of each group that are held back; take a far smaller one, or 'auto' with a target",
            stacklevel=3,
        )

    def _follow(self, decision: Decision | None) -> None:
        if decision is not None:
            self._strength, self._met = decision.strength, decision.met
            self._weights.copy_(decision.weights)

    @torch.no_grad()
    def project_(self, model: nn.Module) -> None:
        """Set the held zeros to zero in a copy of the model, for instance an average of its weights over time."""
        tensors = dict(_unwrapped(model).named_parameters())
        self._penalised.hold_(self._alive, tensors)

    def worth(self) -> Masks:
        """With strength "auto", what the channels of each free group are worth by now, on the CPU; >= 0, comparable.

        Infinite for groups that the penalty does not act on: they stay. For `choose_channels` and `search_speed`, whose
        masks `settle` takes. Waits for the device. Raises InputError without "auto".
        """
        learned = self._planning().worth(self._alive)
        return {g.name: learned.get(g.name, torch.full((g.n_channels,), math.inf)) for g in self._groups.free}

    def planned_masks(self) -> Masks:
        """With strength "auto", keep-masks of what would be left if the phase ended as it is planned now.

        Cut a copy of the model by them to see, early in a phase, how fast the outcome will be. Waits for the device.
        Raises InputError without "auto".
        """
        return self._planning().planned_masks(self._alive)

    def retarget(self, target: Mapping[Quantity, float]) -> None:
        """With strength "auto", go for another share of the same quantity from the next plan on.

        Raises InputError without "auto", for another quantity, or for a share that is out of reach.
        """
        self._planning().retarget(target, self._alive)
        self._met = False

    def settle(self, masks: Masks) -> None:
        """With strength "auto", let exactly the channels die that keep-masks drop, and choose no others.

        For an outcome that was cut and timed before it was trained: `planned_masks`, perhaps with some entries changed,
        to `make_plan` and `apply_plan`, and here what was fast enough. The target becomes what the masks leave.
        Raises InputError without "auto", or for masks of other groups.
        """
        self._planning().settle(masks)
        self._met = False

    def _planning(self) -> Controller:
        if self._controller is None:
            raise InputError("a penalty of constant strength has no plan and no target; take strength 'auto'")
        return self._controller

    def shortfall(self) -> str:
        """With strength "auto", how far from its target the phase is; "" once it is met, or without one.

        Waits for the device.
        """
        return "" if self._controller is None else self._controller.shortfall(self._alive)

    def progress(self) -> dict[str, float]:
        """`zero_share`: fraction of penalised channels that are exactly zero; `strength`: as used last.

        Waits for the device, so not for every step.
        """
        alive = self._alive.cpu()
        if self._controller is None:
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
            "weights": split(self._weights.clone()),
            "controller": {} if self._controller is None else self._controller.state_dict(),
            "pull": {} if self._pull is None else self._pull.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises InputError if it was taken from a model with other groups."""
        numbers = self._penalised.numbers
        sizes = dict(zip(numbers.names, numbers.sizes, strict=True))
        if {name: len(alive) for name, alive in state["alive"].items()} != sizes:
            raise InputError("the sparsifier's state belongs to a model with other channel groups")
        if bool(state["controller"]) != (self._controller is not None):
            raise InputError(
                "the sparsifier's state belongs to one with an automatic strength, or this one has one and it had none"
            )
        if bool(state.get("pull")) != (self._pull is not None):
            raise InputError(
                "the sparsifier's state belongs to one that revives channels, or this one does and it did not"
            )
        self._steps, self._strength, self._met = state["steps"], state["strength"], state["met"]
        self._alive.copy_(numbers.join(state["alive"]))
        self._weights.copy_(numbers.join(state["weights"]))
        self._acted = True
        if self._controller is not None:
            self._controller.load_state_dict(state["controller"])
        if self._pull is not None:
            self._pull.load_state_dict(state["pull"])


def _check_arguments(
    penalty: str,
    strength: float | str,
    total_steps: int | None,
    target: Mapping[Quantity, float] | None,
    round_to: int,
    importance: Importance,
    revive: bool,
) -> None:
    if penalty not in get_args(Penalty):
        raise InputError(f"penalty must be one of {', '.join(get_args(Penalty))}, got {penalty!r}")
    if importance not in get_args(Importance):
        raise InputError(f"importance must be one of {', '.join(get_args(Importance))}, got {importance!r}")
    if strength == "auto" and (total_steps is None or not target):
        raise InputError("strength 'auto' needs total_steps and a target such as {'macs': 0.5}")
    if strength == "auto" and penalty == "group_mcp":
        raise InputError(
            "penalty 'group_mcp' spares what is far from zero, so strength 'auto' cannot take it there; 'auto' shrinks "
            "no channel that is to stay, so take 'group_lasso', or give a strength"
        )
    if strength == "auto" and revive:
        raise InputError(
            "revive is for a constant strength; 'auto' chooses anew, until it has met its target, which channels go"
        )
    if strength != "auto" and not (isinstance(strength, (int, float)) and 0 <= strength < math.inf):
        raise InputError(f"strength must be a finite number >= 0 or 'auto', got {strength!r}")
    if total_steps is not None and total_steps < 1:
        raise InputError(f"total_steps must be at least 1, got {total_steps}")
    if round_to < 1:
        raise InputError(f"round_to must be at least 1, got {round_to}")


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
