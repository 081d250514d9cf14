"""How an automatic strength meets its target: which channels have to die for it, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError, TrainingError
from sparsekit.options import Quantity
from sparsekit.selection.bisection import relative_importance, step_importance, threshold_for_share
from sparsekit.selection.costs import CostModel
from sparsekit.selection.importance import filter_norms
from sparsekit.selection.keep_masks import check_target
from sparsekit.selection.rounding import round_up
from sparsekit.sparsify.learned_importance import note_effects_
from sparsekit.sparsify.penalised_weights import PenalisedWeights
from sparsekit.sparsify.strength import AutoStrength
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks, Scores

# How many decisions are made in the penalised part of a phase.
_DECISIONS = 100
# Channels are to be dead at this share of the penalised part. What gradients held up dies in the rest.
_AIMED_SHARE = 0.9


@dataclass(frozen=True)
class Decision:
    """What is shrunk from now on: the threshold of a channel in a step is rate x strength x its multiplier.

    `multipliers` are (n,), in the order of `PenalisedWeights.numbers`, and 0 for channels that stay. `strength` is 0
    once the target is met.
    """

    multipliers: Tensor
    strength: float
    met: bool = False


class Steering:
    """Decides which channels die, and how fast, until a cut of the zeros would meet the target.

    The steps of channels with the least importance for their cost have to die; nothing else is shrunk. Without a
    gradient a step takes rate x strength x multiplier off a channel's distance to zero. The multiplier is the distance
    at the start, so a channel that is the share d of it away dies in n more steps at

        strength = d / (n x rate)

    and all that are chosen die together. Choice and pace are decided anew a hundred times between the warm-up and the
    debias part. The pace never falls, or channels near zero would stay in the noise of the gradients.

    The importance of a channel is, by `AutoStrength.importance`,

    - "magnitude": (norm of its filters / mean of its group)^2 at the start; for a residual block, (root mean square of
      its scales / mean of that over the blocks)^2;
    - "taylor": the running mean of its squared first-order effect on the loss (`learned_importance`).

    The strength's `costs` divide it. After `settle` exactly the channels that its masks drop die. Raises InputError if
    the target is out of reach.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        penalised: PenalisedWeights,
        strength: AutoStrength,
        relative_costs: Mapping[str, float],
    ) -> None:
        check_target(groups, strength.target)
        self._groups, self._penalised = groups, penalised
        self._cost_model = CostModel(groups)
        ((self._quantity, self._target),) = strength.target.items()
        self._rounding = {group.name: group.rounding for group in groups.free}
        self._first = strength.total_steps * strength.shares.warmup
        self._length = strength.total_steps * (1 - strength.shares.debias - strength.shares.warmup)
        self._pace = 0.0
        self._settled: Masks = {}
        self._split = penalised.numbers.split
        self._start = penalised.distances()
        self._costs = penalised.numbers.join(relative_costs).to(self._start)
        self._importance = self._magnitudes(model)
        self._choose([group.name for group in penalised.groups], torch.ones_like(self._start))
        self._learns = strength.importance == "taylor"
        if self._learns:
            self._importance.zero_()

    def observe(self, step: int) -> None:
        """Learn importance from the gradients of a step."""
        if self._learns and not self._settled and step < self._first + self._length:
            note_effects_(self._importance, self._penalised.tensors, self._penalised.shrunk)

    @torch.no_grad()
    def decide(self, step: int, alive: Tensor, rates: Mapping[str, float]) -> Decision | None:
        """Return what to do from this step on, or None if no decision is due.

        `alive` (n,) is 0 for channels that are held at zero. `rates` are those of the groups that can be shrunk. Raises
        TrainingError if there were no gradients to learn from.
        """
        past = step - self._first
        interval = max(int(self._length / _DECISIONS), 1)
        if not 0 <= past < self._length or step % interval:
            return None
        if self._is_met(alive):
            return Decision(torch.zeros_like(alive), 0.0, met=True)
        importance = self._split(self._importance)
        if self._learns and not self._settled and not any(bool(importance[name].any()) for name in rates):
            raise TrainingError(
                "importance 'taylor' learns from gradients, and there were none when the Sparsifier's step was called; "
                "call it after optimizer.step() and before zero_grad(), or take importance 'magnitude'"
            )
        multipliers, furthest = self._choose(list(rates), alive)
        steps_left = max(_AIMED_SHARE * self._length - past, interval)
        self._pace = max(self._pace, furthest / steps_left)
        rate = sum(rates.values()) / len(rates)
        return Decision(multipliers, self._pace / rate if rate > 0 else 0.0)

    def importance(self, alive: Tensor) -> Scores:
        """Return the importance of each group's channels so far, on the CPU; 0 for those at zero."""
        return self._split((self._importance * (alive > 0)).cpu())

    @torch.no_grad()
    def expected_masks(self, alive: Tensor) -> Masks:
        """Return keep-masks, rounded, of what would be left if the phase ended as it is decided now."""
        doomed = self._doomed(self._penalised.numbers.names, alive)
        return self._rounded(self._split(((alive > 0) & ~doomed).cpu()))

    @torch.no_grad()
    def retarget(self, target: Mapping[Quantity, float], alive: Tensor) -> None:
        """Aim for another share of the quantity. Raises InputError for another quantity, or a share out of reach."""
        if set(target) != {self._quantity}:
            raise InputError(f"the phase has a target of {self._quantity}, got {dict(target)}")
        before = self._target, self._settled
        self._target, self._settled = target[self._quantity], {}
        try:
            self.expected_masks(alive)
        except InputError:
            self._target, self._settled = before
            raise

    def settle(self, masks: Masks) -> None:
        """Take to zero exactly the channels that these keep-masks drop. The target becomes what they leave.

        Raises InputError for masks of other groups, or that drop channels which are not penalised.
        """
        sizes = {name: values.shape for name, values in self._split(self._importance).items()}
        if {name: mask.shape for name, mask in masks.items() if name in sizes} != sizes:
            raise InputError(
                "the masks to settle on are of other channel groups; take those that expected_masks returns, or change "
                "some of their entries"
            )
        lasting = sorted(name for name, mask in masks.items() if name not in sizes and not bool(mask.all()))
        if lasting:
            raise InputError(
                f"the masks to settle on drop channels of {lasting[0]}, which the penalty does not act on"
            )
        self._settled = {name: masks[name].cpu() for name in sizes}
        self._target = self._share(self._settled)

    def share_left(self, alive: Tensor) -> float:
        """Return the share of the target's quantity that a cut of the zeros would leave."""
        return self._share(self._split((alive > 0).cpu()))

    def shortfall(self, alive: Tensor) -> str:
        """Say how far from its target the phase is; "" once it is met."""
        if self._is_met(alive):
            return ""
        if self._settled:
            chosen = sum(int((~mask).sum()) for mask in self._settled.values())
            lacking = f"{self._undead(alive)} of the {chosen} channels that were to go are not zero"
        else:
            lacking = (
                f"the zeros would leave {self.share_left(alive):.3f} of the {self._quantity}, and {self._target:g} was "
                "asked for"
            )
        return (
            f"{lacking}: gradients held up what had to die in the steps there were; take more epochs, a higher "
            "learning rate, or less debias"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {
            "importance": self._split(self._importance.clone()),
            "start": self._split(self._start.clone()),
            "pace": self._pace,
            "costs": self._split(self._costs.clone()),
            "target": self._target,
            "settled": dict(self._settled),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` returned."""
        self._pace, self._target = state["pace"], state["target"]
        self._settled = {name: mask.cpu() for name, mask in state["settled"].items()}
        own = (("importance", self._importance), ("start", self._start), ("costs", self._costs))
        for key, vector in own:
            vector.copy_(self._penalised.numbers.join(state[key]))

    def _magnitudes(self, model: nn.Module) -> Tensor:
        norms, distances = filter_norms(model, self._groups), self._split(self._start)
        # Groups of bare parameters have no filters.
        known = {name: norms[name].to(d) if norms[name].any() else d for name, d in distances.items()}
        found = {name: relative_importance({name: norm})[name] for name, norm in known.items()}
        # A residual block is alone in its group, so blocks are compared with each other; of equal ones the last goes.
        blocks = [group.name for group in self._penalised.groups if group.bypass]
        if blocks:
            of_group = self._split(self._penalised.norms() / self._penalised.shrunk.sizes.sqrt())
            sizes = torch.cat([of_group[name] for name in blocks])
            tiny = torch.finfo(sizes.dtype).tiny
            relative = (sizes / sizes.mean().clamp_min(tiny)).square() * (
                1 - 1e-5 * torch.arange(len(sizes)).to(sizes)
            )
            found.update({name: relative[i : i + 1] for i, name in enumerate(blocks)})
        return self._penalised.numbers.join(found)

    def _choose(self, trained: Sequence[str], alive: Tensor) -> tuple[Tensor, float]:
        """Return multipliers, and the largest distance of a channel that has to die, as a share of its start."""
        distances, doomed = self._penalised.distances(), self._doomed(trained, alive)
        size = torch.maximum(distances, self._start).clamp_min(torch.finfo(distances.dtype).tiny)
        furthest = torch.where(doomed, distances / size, 0.0).max()
        return torch.where(doomed, size, 0.0), float(furthest)

    def _doomed(self, trained: Sequence[str], alive: Tensor) -> Tensor:
        """Return which channels (bool) have to die; none of groups that are not trained."""
        if self._settled:
            doomed = {name: ~self._settled[name] for name in trained}
        else:
            values = self._split((self._importance * (alive > 0) / self._costs).cpu())
            importance = step_importance({name: values[name] for name in trained}, self._rounding)
            threshold = threshold_for_share(
                self._cost_model, self._groups, importance, {self._quantity: self._target}, self._rounded
            )
            doomed = {name: values <= threshold for name, values in importance.items()}
        return self._penalised.numbers.join(doomed).to(alive.device) > 0

    def _rounded(self, masks: Masks) -> Masks:
        """Round masks as the cut will. Which channels come back does not matter to the cost."""
        return {name: round_up(mask, mask.double(), self._rounding[name]) for name, mask in masks.items()}

    def _is_met(self, alive: Tensor) -> bool:
        """Whether all channels are dead that have to be. Masks that were settled on are not rounded again."""
        return not self._undead(alive) if self._settled else self.share_left(alive) <= self._target

    def _undead(self, alive: Tensor) -> int:
        """Count the channels that the settled masks drop and that are not zero yet."""
        left = self._split((alive > 0).cpu())
        return sum(int((left[name] & ~mask).sum()) for name, mask in self._settled.items())

    def _share(self, masks: Masks) -> float:
        return self._cost_model.share(self._quantity, self._rounded(masks))
