"""Try one group of channels at other widths among the cuts of the others, without copying the model each time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsekit.evaluation import copied
from sparsekit.repair.closed_form import repair_, repair_weights
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.statistics import InputStatistics
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.mask import mask_model


class Trials:
    """Tries one group of channels after the other: masked at some width, and the rest of the network run.

    The other groups have the masks `base`, which are everything by default, and what reads them is repaired in closed
    form. Losses are divergences from the dense model on the recorded images of `held_out`.
    """

    def __init__(
        self,
        dense: nn.Module,
        groups: ChannelGroups,
        statistics: InputStatistics,
        held_out: HeldOut,
        base: Masks | None = None,
    ) -> None:
        self._dense, self.groups, self._statistics, self._held_out = dense, groups, statistics, held_out
        self.base = dict(base or {})
        self._model = copied(dense)
        plan = make_plan(groups, self.base)
        self._bypassed = [block.module for block in plan.blocks]
        # Masking in place silences no channels.
        self._by_copies = _silences(plan)
        if self._by_copies:
            self.base_loss = self._loss_of_copy(plan)
            return
        if self.base:
            mask_(self._model, plan, statistics)
            held_out.record_(self._model)
        self.base_loss = held_out.of_change(self._model, ()).kl

    def loss(self, group: ChannelGroup, mask: Tensor) -> float:
        """Return the divergence with this mask of a group."""
        plan = make_plan(self.groups, self.base | {group.name: mask})
        if self._by_copies or _silences(plan):
            return self._loss_of_copy(plan)
        own = {member.tensor for member in group.of_role("consumer")}
        if group.bypass:
            without = make_plan(self.groups, {group.name: torch.zeros(1, dtype=torch.bool)})
            own = {scale for block in without.blocks for scale in block.scales}
        with masked_in_place(self._model, self._dense, plan, self._statistics, own):
            return self._held_out.of_change(self._model, own).kl

    def _loss_of_copy(self, plan: PrunePlan) -> float:
        masked = mask_model(repair_weights(self._dense, plan, self._statistics), plan)
        return self._held_out.of_recorded(masked).kl

    def is_bypassed(self, group: ChannelGroup) -> bool:
        """Whether the group lies in a residual block that the base leaves out."""
        return any(group.lies_in(block) and group.bypass != block for block in self._bypassed)


def _silences(plan: PrunePlan) -> bool:
    """Whether it cuts channels that something adds up."""
    return any(cut.silenced for cut in plan.cuts)


def mask_(model: nn.Module, plan: PrunePlan, statistics: InputStatistics) -> None:
    """Mask a model by a plan and repair it, in place; for plans that silence no channels."""
    tensors = dict(model.named_parameters())
    repair_(model, plan, statistics)
    with torch.no_grad():
        for block in plan.blocks:
            for scale in block.scales:
                tensors[scale].zero_()


@contextmanager
def masked_in_place(
    model: nn.Module,
    dense: nn.Module,
    plan: PrunePlan,
    statistics: InputStatistics,
    tensors: Collection[str],
) -> Iterator[None]:
    """As `mask_`, for a while, of these tensors and the biases beside them, made anew of those of the dense model."""
    layers = {layer: model.get_submodule(layer) for layer in {name.rpartition(".")[0] for name in tensors}}
    # A repair adds to biases, or makes one where there was none.
    biases = {
        layer: owner._parameters["bias"] for layer, owner in layers.items() if "bias" in owner._parameters
    }
    theirs = dict([*dense.named_parameters(), *dense.named_buffers()])
    changed = {*tensors, *(f"{layer}.bias" for layer in biases)}
    ours = dict([*model.named_parameters(), *model.named_buffers()])
    before = {name: ours[name].detach().clone() for name in changed & ours.keys()}
    plan = replace(
        plan,
        cuts=tuple(cut for cut in plan.cuts if cut.tensor in tensors),
        blocks=tuple(replace(b, scales=tuple(s for s in b.scales if s in changed)) for b in plan.blocks),
    )
    try:
        with torch.no_grad():
            for layer in biases:
                if f"{layer}.bias" not in theirs:
                    layers[layer]._parameters["bias"] = None
            for name in changed & theirs.keys():
                ours[name].copy_(theirs[name])
        mask_(model, plan, statistics)
        yield
    finally:
        for layer, bias in biases.items():
            layers[layer]._parameters["bias"] = bias
        with torch.no_grad():
            for name, values in before.items():
                ours[name].copy_(values)
