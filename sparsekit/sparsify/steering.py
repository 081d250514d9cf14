"""How an automatic strength is steered so that its target is met: which channels have to die for it, and how fast."""

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

# How often in the penalised part of a phase a new decision is made.
_DECISIONS = 100
# The aim is to be done a little before the penalised part ends: what gradients held up dies in the rest.
_AIMED_SHARE = 0.9


@dataclass(frozen=True)
class Decision:
    """What is to be shrunk from now on: a channel's threshold in a step is rate x strength x its multiplier.

    `multipliers` (n,), in the order of `PenalisedWeights.numbers`: 0 for channels that are to live. `strength` is 0
    once the target is met.
    """

    multipliers: Tensor
    strength: float
    met: bool = False


class Steering:
    """Decides what dies until what is left, rounded as a cut rounds it, meets the target of an automatic strength.

    The steps of channels that are least important for what they cost have to die, and nothing else is shrunk. The
    *shrink budget*: without a gradient a channel loses rate x strength x multiplier of its distance to zero in each
    step. With its distance at the start as the multiplier, one that is the share d of that away dies in n more steps at

        strength = d / (n x rate)

    so all that are chosen fall evenly, and together. Choice and pace are decided anew a hundred times between the
    warm-up and the debias part. The pace never falls, because what is nearly zero would else be shrunk less and less
    and stay in the noise of the gradients.

    A channel's importance is, by `AutoStrength.importance`,

    - "magnitude": (norm of its filters / mean of its group)^2, as the model was at the start; of a block, (root mean
      square of its scales / mean of that over the blocks)^2;
    - "taylor": the running mean of its squared first-order effect on the loss, from the gradients that `observe` sees
      (`learned_importance`).

    The strength's `costs` divide it. `settle` ends the choosing: exactly what its masks drop goes, at the pace that is
    left. Raises InputError if the target is out of reach.
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
        """Learn from the gradients of a step how important the channels are."""
        if self._learns and not self._settled and step < self._first + self._length:
            note_effects_(self._importance, self._penalised.tensors, self._penalised.shrunk)

    @torch.no_grad()
    def decide(self, step: int, alive: Tensor, rates: Mapping[str, float]) -> Decision | None:
        """What to do from this step on, or None if it is not the time to decide anew.

        `alive` (n,) is 0 for channels that are held at zero; `rates` are those of the groups that can be shrunk.
        Raises TrainingError if there were no gradients to learn from.
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
        """How important the channels of each group are by now, on the CPU; 0 of those at zero."""
        return self._split((self._importance * (alive > 0)).cpu())

    @torch.no_grad()
    def expected_masks(self, alive: Tensor) -> Masks:
        """Keep-masks (on the CPU, rounded) of what would be left if the phase ended as it is decided now."""
        doomed = self._doomed(self._penalised.numbers.names, alive)
        return self._rounded(self._split(((alive > 0) & ~doomed).cpu()))

    @torch.no_grad()
    def retarget(self, target: Mapping[Quantity, float], alive: Tensor) -> None:
        """Go for another share of the same quantity. Raises InputError for another one, or a share out of reach."""
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
        """Take to zero exactly what these keep-masks drop; the target is what they leave.

        Raises InputError if they are not those of the groups that are penalised, or drop channels of others as well.
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
        """What a cut of the zeros would leave of the target's quantity."""
        return self._share(self._split((alive > 0).cpu()))

    def shortfall(self, alive: Tensor) -> str:
        """ "" if the target is met; else how far the phase got."""
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
        """Everything a resumed run needs to decide as if it had not stopped."""
        return {
            "importance": self._split(self._importance.clone()),
            "start": self._split(self._start.clone()),
            "pace": self._pace,
            "costs": self._split(self._costs.clone()),
            "target": self._target,
            "settled": dict(self._settled),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
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
        # A block is alone in its group: blocks are compared with each other, and of equal ones the last goes first.
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
        """Multipliers of the channels, and how far the furthest of the chosen is, as a share of where it started."""
        distances, doomed = self._penalised.distances(), self._doomed(trained, alive)
        size = torch.maximum(distances, self._start).clamp_min(torch.finfo(distances.dtype).tiny)
        furthest = torch.where(doomed, distances / size, 0.0).max()
        return torch.where(doomed, size, 0.0), float(furthest)

    def _doomed(self, trained: Sequence[str], alive: Tensor) -> Tensor:
        """Which channels (bool) have to die; none of groups that are not trained."""
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
        """The masks as the cut will round them; which channels come back does not matter to the cost."""
        return {name: round_up(mask, mask.double(), self._rounding[name]) for name, mask in masks.items()}

    def _is_met(self, alive: Tensor) -> bool:
        """Whether all is dead that has to be. What was settled on is cut as it is, so it is not rounded again."""
        return not self._undead(alive) if self._settled else self.share_left(alive) <= self._target

    def _undead(self, alive: Tensor) -> int:
        """How many of the channels that were settled on are not zero yet."""
        left = self._split((alive > 0).cpu())
        return sum(int((left[name] & ~mask).sum()) for name, mask in self._settled.items())

    def _share(self, masks: Masks) -> float:
        return self._cost_model.share(self._quantity, self._rounded(masks))
