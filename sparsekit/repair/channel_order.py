"""Which channels of a group go first: those that the layers which read them can predict best from the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparsekit.options import FinishedImportance
from sparsekit.repair.lasso_order import lasso_order
from sparsekit.repair.least_squares import Columns, Moments, greedy_order
from sparsekit.repair.statistics import InputStatistics, LayerStatistics
from sparsekit.structure.groups import ChannelGroup, ChannelGroups

# Up to so many channels are removed one after the other; of more, several at once.
_ONE_BY_ONE = 96
# The curvature of the loss is known from few images, so each direction counts a little.
_LEAST_SENSITIVITY = 1e-4


def channel_order(
    model: nn.Module,
    group: ChannelGroup,
    statistics: InputStatistics,
    importance: FinishedImportance = "greedy",
) -> tuple[Tensor, Tensor] | None:
    """Return the order in which the channels of a group go, and the predicted cost; None if nothing can be said.

    It is the greedy order of `least_squares`, or that of `lasso_order`, summed over all layers that read the group,
    their outputs weighed by how much the loss depends on them. Of either the cost is what least squares leaves. A group
    that no such layer reads is ordered by its gate score.
    """
    layers = [
        columns
        for member in group.of_role("consumer")
        if member.tensor in statistics.layers
        for columns in _columns(
            model, statistics.layers[member.tensor], member.positions, group.n_channels, member.repeat
        )
    ]
    if layers and importance == "lasso":
        return lasso_order(layers)
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


def order_by_gates(groups: ChannelGroups, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gate scores of free groups as importance; residual blocks stay."""
    return {
        g.name: gates[g.name] if not g.bypass else torch.full((1,), torch.inf, dtype=torch.float64)
        for g in groups.free
    }
