"""Loss curves of the groups of a finished model: which channels go first, and what it costs, measured after repair."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.repair.closed_form import repair_, repair_weights
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.least_squares import Columns, Moments, greedy_order
from sparsekit.repair.statistics import InputStatistics, LayerStatistics
from sparsekit.selection.knapsack import counts_of
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.mask import mask_model

# A curve is measured at these shares of the group's width, rounded to what it may keep.
_SHARES = (0.8, 0.6, 0.4, 0.2)
# Up to so many channels are removed one after the other; of more, several at once.
_ONE_BY_ONE = 96
# The curvature of the loss is known from few images, so each direction counts a little.
_LEAST_SENSITIVITY = 1e-4
# Near a choice a group is tried with so many of its channels more and fewer.
_REACH = 0.25


def channel_order(
    model: nn.Module, group: ChannelGroup, statistics: InputStatistics
) -> tuple[Tensor, Tensor] | None:
    """Return the order in which the channels of a group go, and the predicted cost; None if nothing can be said.

    It is the greedy order of `least_squares`, summed over all layers that read the group, their outputs weighed by how
    much the loss depends on them. A group that no such layer reads is ordered by its gate score.
    """
    layers = [
        columns
        for member in group.of_role("consumer")
        if member.tensor in statistics.layers
        for columns in _columns(
            model, statistics.layers[member.tensor], member.positions, group.n_channels, member.repeat
        )
    ]
    if layers:
        return greedy_order(layers, at_once=max(group.n_channels // _ONE_BY_ONE, 1))
    gates = statistics.gates.get(group.name)
    if gates is None or group.bypass:
        return None
    order = gates.argsort(stable=True)
    return order, torch.cat([torch.zeros(1, dtype=torch.float64), gates[order].cumsum(0)])


def _columns(
    model: nn.Module, known: LayerStatistics, positions: tuple[int, ...], n_channels: int, repeat: int
) -> Iterator[Columns]:
    reader, moments = known.reader, known.moments
    device = moments.mean.device
    weight = reader.weight(model.get_submodule(reader.module)).to(device)
    own = reader.columns_of(torch.tensor(positions, device=device)).reshape(n_channels, -1)
    if reader.maps > 1:
        own = own[:, :1]
    for g in range(reader.conv_groups):
        matrix = weight[g]
        if known.sensitivity.dim() == 2:
            root = _root(reader.per_output(known.sensitivity, g).to(matrix))
            places = matrix.shape[0] // root.shape[0]
            matrix = torch.einsum("pq,qtk->ptk", root, matrix.reshape(len(root), places, -1)).flatten(0, 1)
        yield Columns(
            matrix, Moments(moments.mean[g : g + 1], moments.covariance[g : g + 1], moments.rows), own
        )


def _root(sensitivity: Tensor) -> Tensor:
    """Return a matrix whose square is `sensitivity`, with its smallest eigenvalues raised."""
    values, vectors = torch.linalg.eigh(sensitivity)
    values = values.clamp_min(_LEAST_SENSITIVITY * float(values.mean().clamp_min(1e-30)))
    root: Tensor = vectors.T * values.sqrt()[:, None]
    return root


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
        self._model = copy.deepcopy(dense)
        plan = make_plan(groups, self.base)
        # Masking in place does not know the cuts of norms that look at all channels.
        self._by_copies = _looks_at_all_channels(plan)
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
        if self._by_copies or _looks_at_all_channels(plan):
            return self._loss_of_copy(plan)
        own = {member.tensor for member in group.of_role("consumer")}
        if group.bypass:
            without = make_plan(self.groups, {group.name: torch.zeros(1, dtype=torch.bool)})
            own = {scale for block in without.blocks for scale in block.scales}
        with masked_in_place(self._model, plan, self._statistics, dense=self._dense, only=own):
            return self._held_out.of_change(self._model, own).kl

    def _loss_of_copy(self, plan: PrunePlan) -> float:
        masked = mask_model(repair_weights(self._dense, plan, self._statistics), plan)
        return self._held_out.of_recorded(masked).kl

    def is_bypassed(self, group: ChannelGroup) -> bool:
        """Whether the group lies in a residual block that the base leaves out."""
        return any(
            other.bypass and group.name != other.name and group.lies_in(other.bypass)
            for other in self.groups.free
            if other.name in self.base and not bool(self.base[other.name].any())
        )


def _looks_at_all_channels(plan: PrunePlan) -> bool:
    """Whether it cuts norms that look at all channels."""
    return any(cut.role in ("layer_norm", "response") for cut in plan.cuts)


def loss_curves(
    model: nn.Module,
    groups: ChannelGroups,
    statistics: InputStatistics,
    held_out: HeldOut,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LossCurve | Tensor]:
    """Measure the loss curve of each free group: the divergence from the dense model on images kept apart.

    Each group alone is masked at up to four of its widths and repaired in closed form, and the rest of the network is
    run. A residual block is tried without. A group of which nothing is known has infinite importance in the place of a
    curve: it stays. `model` is the dense model.
    """
    trials = Trials(model, groups, statistics, held_out)
    curves: dict[str, LossCurve | Tensor] = {}
    for group in _each(groups, progress):
        found = None if group.bypass else channel_order(model, group, statistics)
        if group.bypass:
            order, costs = torch.zeros(1, dtype=torch.int64), torch.tensor([0.0, 1.0])
        elif found is None:
            curves[group.name] = torch.full((group.n_channels,), torch.inf)
            continue
        else:
            order, costs = found[0].cpu(), found[1].cpu()
        measured = {n: trials.loss(group, _first(order.flip(0), n)) for n in _widths(group)}
        curves[group.name] = LossCurve.through(order, costs, measured)
    return curves


def curves_around(
    trials: Trials,
    known: Mapping[str, LossCurve | Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LossCurve | Tensor]:
    """Return the means of the known curves and of those measured again with the other groups cut as in the trials.

    Cuts add up to more than each costs alone. Where the others are cut half as far as they will be, a curve says what a
    group costs then; alone it is steep where the others happen to be narrow.
    """
    curves = dict(known)
    for group in _each(trials.groups, progress):
        before = known[group.name]
        if isinstance(before, LossCurve) and not trials.is_bypassed(group):
            whole = trials.loss(group, torch.ones(group.n_channels, dtype=torch.bool))
            if not math.isfinite(whole):
                continue
            measured = {n: trials.loss(group, _first(before.order, n)) - whole for n in _widths(group)}
            shape = torch.from_numpy(before.losses[::-1].copy())
            again = LossCurve.through(before.order.flip(0), shape, measured)
            curves[group.name] = before.mean_with(again)
    return curves


def curves_near(
    trials: Trials,
    known: Mapping[str, LossCurve | Tensor],
    *,
    reach: float = _REACH,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LossCurve | Tensor]:
    """Measure the curves again near the widths of the trials' base: `reach` of each group's channels more and fewer.

    They are good for one step from there: they forbid widths beyond, and residual blocks stay as they are.
    """
    curves = dict(known)
    for group in _each(trials.groups, progress):
        before = known[group.name]
        if not isinstance(before, LossCurve):
            continue
        now, order = int(trials.base[group.name].sum()), before.order
        if group.bypass or trials.is_bypassed(
            group
        ):  # no fewer than now; what is out costs nothing to leave out
            curves[group.name] = LossCurve.near(order, {now: 0.0})
        else:
            step = max(int(reach * group.n_channels), 1)
            allowed = [int(n) for n in counts_of(group)]
            fewer = max((n for n in allowed if n <= now - step), default=min(allowed))
            more = min((n for n in allowed if n >= now + step), default=max(allowed))
            losses = {n: trials.loss(group, _first(order, n)) for n in {fewer, more} - {now}}
            curves[group.name] = LossCurve.near(order, {now: trials.base_loss, **losses})
    return curves


def _each(groups: ChannelGroups, progress: Callable[[int, int], None] | None) -> Iterator[ChannelGroup]:
    for number, group in enumerate(groups.free):
        if progress is not None:
            progress(number, len(groups.free))
        yield group
    if progress is not None:
        progress(len(groups.free), len(groups.free))


def _first(order: Tensor, count: int) -> Tensor:
    """A mask that keeps the first channels of an order."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def _widths(group: ChannelGroup) -> list[int]:
    """List at how many channels left a group is measured, from many to few; residual blocks at 0."""
    allowed = [int(n) for n in counts_of(group)][:-1]
    if not allowed:
        return []
    wanted = [share * group.n_channels for share in _SHARES]
    distances = abs(np.array(allowed)[:, None] - np.array(wanted)[None])
    return sorted({allowed[i] for i in distances.argmin(0)}, reverse=True)


def mask_(model: nn.Module, plan: PrunePlan, statistics: InputStatistics) -> None:
    """Mask a model by a plan and repair it, in place; for plans without cuts of norms that look at all channels."""
    tensors = dict(model.named_parameters())
    repair_(model, plan, statistics)
    with torch.no_grad():
        for block in plan.blocks:
            for scale in block.scales:
                tensors[scale].zero_()


@contextmanager
def masked_in_place(
    model: nn.Module,
    plan: PrunePlan,
    statistics: InputStatistics,
    *,
    dense: nn.Module | None = None,
    only: Collection[str] | None = None,
) -> Iterator[list[str]]:
    """As `mask_`, for a while; gives the names of the tensors that are changed.

    With `only`, these tensors alone are changed, and made anew of those of `dense`.
    """
    if only is not None:
        plan = replace(
            plan,
            cuts=tuple(cut for cut in plan.cuts if cut.tensor in only),
            blocks=tuple(replace(b, scales=tuple(s for s in b.scales if s in only)) for b in plan.blocks),
        )
    names = [cut.tensor for cut in plan.cuts if cut.role == "consumer" and cut.drop]
    names += [scale for block in plan.blocks for scale in block.scales]
    names = list(dict.fromkeys(names if only is None else only))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    before = {name: tensors[name].detach().clone() for name in names}
    layers = {
        layer: model.get_submodule(layer) for layer in dict.fromkeys(n.rpartition(".")[0] for n in names)
    }
    # A repair adds to biases, or makes one where there was none.
    biases = {
        name: layer._parameters["bias"] for name, layer in layers.items() if "bias" in layer._parameters
    }
    kept = {name: bias.detach().clone() for name, bias in biases.items() if bias is not None}
    try:
        if dense is not None:
            _take_(model, dense, names, biases.keys())
        mask_(model, plan, statistics)
        yield names
    finally:
        with torch.no_grad():
            for name, bias in biases.items():
                layers[name]._parameters["bias"] = bias
                if bias is not None:
                    bias.copy_(kept[name])
            for name, values in before.items():
                tensors[name].copy_(values)


def _take_(model: nn.Module, dense: nn.Module, names: Collection[str], layers: Collection[str]) -> None:
    """Give these tensors, and the biases of these layers, the values that they have in the dense model."""
    theirs = dict([*dense.named_parameters(), *dense.named_buffers()])
    ours = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name in layers:
            if f"{name}.bias" not in theirs:
                model.get_submodule(name)._parameters["bias"] = None
        for name in {*names, *(f"{layer}.bias" for layer in layers)} & theirs.keys():
            ours[name].copy_(theirs[name])


def order_by_gates(groups: ChannelGroups, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gate scores of free groups as importance; residual blocks stay."""
    return {
        g.name: gates[g.name] if not g.bypass else torch.full((1,), torch.inf, dtype=torch.float64)
        for g in groups.free
    }
