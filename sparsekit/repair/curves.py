"""Loss curves of the groups of a finished model: which channels go first, and what it costs, measured after repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.repair.closed_form import repair_
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
    curve: it stays. `model` is the dense model, whose weights change and come back.
    """
    curves: dict[str, LossCurve | Tensor] = {}
    for number, group in enumerate(groups.free):
        if progress is not None:
            progress(number, len(groups.free))
        found = None if group.bypass else channel_order(model, group, statistics)
        if group.bypass:
            order, costs = torch.zeros(1, dtype=torch.int64), torch.tensor([0.0, 1.0])
        elif found is None:
            curves[group.name] = torch.full((group.n_channels,), torch.inf)
            continue
        else:
            order, costs = found[0].cpu(), found[1].cpu()
        measured = {}
        for count in _widths(group):
            mask = torch.zeros(group.n_channels, dtype=torch.bool)
            mask[order[group.n_channels - count :]] = True
            measured[count] = _loss(model, groups, {group.name: mask}, statistics, held_out)
        curves[group.name] = LossCurve.through(order, costs, measured)
    if progress is not None:
        progress(len(groups.free), len(groups.free))
    return curves


def _widths(group: ChannelGroup) -> list[int]:
    """List at how many channels left a group is measured, from many to few; residual blocks at 0."""
    allowed = [int(n) for n in counts_of(group)][:-1]
    if not allowed:
        return []
    wanted = [share * group.n_channels for share in _SHARES]
    distances = abs(np.array(allowed)[:, None] - np.array(wanted)[None])
    return sorted({allowed[i] for i in distances.argmin(0)}, reverse=True)


def _loss(
    model: nn.Module, groups: ChannelGroups, masks: Masks, statistics: InputStatistics, held_out: HeldOut
) -> float:
    plan = make_plan(groups, masks)
    if any(cut.role in ("layer_norm", "response") for cut in plan.cuts):
        with masked_in_place(model, plan, statistics, blocks=False):
            masked = mask_model(model, plan)
        return held_out.of(masked).kl
    with masked_in_place(model, plan, statistics) as changed:
        return held_out.of_change(model, changed).kl


@contextmanager
def masked_in_place(
    model: nn.Module, plan: PrunePlan, statistics: InputStatistics, *, blocks: bool = True
) -> Iterator[list[str]]:
    """Mask a model by a plan and repair it, for a while; gives the names of the tensors that are changed.

    For plans without cuts of norms that look at all channels.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    names = [cut.tensor for cut in plan.cuts if cut.role == "consumer" and cut.drop]
    names += [scale for block in plan.blocks for scale in block.scales] if blocks else []
    before = {name: tensors[name].detach().clone() for name in names}
    layers = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    # A repair adds to biases, or makes one where there was none.
    biases = [
        (layer, bias, None if bias is None else bias.detach().clone())
        for layer in layers
        if "bias" in layer._parameters
        for bias in [layer._parameters["bias"]]
    ]
    try:
        repair_(model, plan, statistics)
        with torch.no_grad():
            for block in plan.blocks if blocks else ():
                for scale in block.scales:
                    tensors[scale].zero_()
        yield names
    finally:
        with torch.no_grad():
            for layer, bias, kept in biases:
                layer._parameters["bias"] = bias
                if bias is not None and kept is not None:
                    bias.copy_(kept)
            for name, values in before.items():
                tensors[name].copy_(values)


def order_by_gates(groups: ChannelGroups, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gate scores of free groups as importance; residual blocks stay."""
    return {
        g.name: gates[g.name] if not g.bypass else torch.full((1,), torch.inf, dtype=torch.float64)
        for g in groups.free
    }
