"""The channels of several groups as one vector, and the weights that each of them owns.

A network has a hundred short vectors of scales. One call for each would cost more than the arithmetic, on a GPU a
hundred times more. So a penalty takes a few calls for all of them together; only tensors of more than one dimension get
calls of their own. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekit.sparsify.prox import soft_threshold_
from sparsekit.structure.groups import ChannelGroup, Member


class ChannelNumbers:
    """Numbers the channels of `groups` from 0 to n - 1, group by group."""

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        self.names = [group.name for group in groups]
        self.sizes = [group.n_channels for group in groups]
        self.first = np.cumsum([0, *self.sizes])[:-1].tolist()
        self.n = sum(self.sizes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views (n_channels,) of a vector (n,), by group name."""
        return dict(zip(self.names, torch.split(flat, self.sizes), strict=True))

    def join(self, by_group: Mapping[str, Tensor | float]) -> Tensor:
        """Return a new vector (n,) of one number, or (n_channels,), for each group; 0 for groups without."""
        parts = []
        for name, size in zip(self.names, self.sizes, strict=True):
            value = by_group.get(name, 0.0)
            parts.append(value if isinstance(value, Tensor) else torch.full((size,), float(value)))
        return torch.cat(parts)


class Largest:
    """Finds the channels with the largest values: `counts` of them, one count for each group."""

    def __init__(self, numbers: ChannelNumbers, counts: Sequence[int], device: torch.device) -> None:
        counts = [min(count, size) for count, size in zip(counts, numbers.sizes, strict=True)]
        # Each group is a row, filled up with a channel n that is less than all others.
        rows = torch.full((len(counts), max(numbers.sizes)), numbers.n)
        for row, first, size in zip(rows, numbers.first, numbers.sizes, strict=True):
            row[:size] = torch.arange(first, first + size)
        self._rows = rows.to(device)
        self._most = max(counts)
        self._counted = (torch.arange(self._most) < torch.tensor(counts)[:, None]).to(device)
        self._behind = numbers.n

    def __call__(self, values: Tensor) -> Tensor:
        """Return the numbers (k,) of the channels with the largest `values` (n,). An entry n is no channel."""
        by_row = F.pad(values, (0, 1), value=-torch.inf)[self._rows]
        columns = by_row.topk(self._most).indices
        return torch.where(self._counted, self._rows.gather(1, columns), self._behind).flatten()


class OwnedWeights:
    """The weights that each channel of `groups` owns in `tensors`: the positions of the members that `members` picks.

    `members` has to pick at least one for each group. All vectors over channels are (n,), in the order of
    `ChannelNumbers`, on the device of the tensors. Methods take tensors by name, so they may be those of a copy of the
    model. `sizes` counts the weights of each channel.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        groups: Sequence[ChannelGroup],
        members: Callable[[ChannelGroup], Sequence[Member]],
    ) -> None:
        numbers = ChannelNumbers(groups)
        owners: dict[tuple[str, int], np.ndarray] = {}
        for group, first in zip(groups, numbers.first, strict=True):
            for member in members(group):
                length = tensors[member.tensor].shape[member.dim]
                owner = owners.setdefault((member.tensor, member.dim), np.full(length, numbers.n))
                owner[list(member.positions)] = np.arange(first, first + group.n_channels).repeat(
                    member.repeat
                )
        self._n = numbers.n
        self.names = [name for name, _ in owners]
        shapes = [tensors[name].shape for name in self.names]
        self._lengths = [len(owner) for owner in owners.values()]
        # The dimensions to reduce in each tensor.
        self._other_dims = [
            [axis for axis in range(len(shape)) if axis != dim]
            for (_, dim), shape in zip(owners, shapes, strict=True)
        ]
        dtypes = {tensors[name].dtype for name in self.names}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.device = tensors[self.names[0]].device
        owner = np.concatenate(list(owners.values()))
        elements = np.repeat(
            [shape.numel() // length for shape, length in zip(shapes, self._lengths, strict=True)],
            self._lengths,
        )
        self.sizes = torch.from_numpy(np.bincount(owner, elements, numbers.n + 1)[:-1]).to(
            self.device, self.dtype
        )
        self._owner = torch.from_numpy(owner).to(self.device)
        # One number for each position, and views that broadcast against the tensors: made once, filled in each step.
        self._spread = torch.empty(len(owner), dtype=self.dtype, device=self.device)
        self._views = [
            piece.view([-1 if axis == dim else 1 for axis in range(len(shape))])
            for piece, (_, dim), shape in zip(
                torch.split(self._spread, self._lengths), owners, shapes, strict=True
            )
        ]
        self._tables, order = _tables(owner, numbers.n)
        self._tables = [table.to(self.device) for table in self._tables]
        self._order = None if order is None else order.to(self.device)

    def norms(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of each channel's weights."""
        return self._over_channels(self._over_rest(tensors, 2).square(), torch.sum).sqrt()

    def largest(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the largest absolute weight of each channel."""
        return self._over_channels(self._over_rest(tensors, torch.inf).abs(), torch.amax)

    def absolute_sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the absolute weights of each channel."""
        return self._over_channels(self._over_rest(tensors, 1).abs(), torch.sum)

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum of `values` over each channel's weights. They have the shapes of the tensors of `names`."""
        along = [
            value.sum(dims, dtype=self.dtype) if dims else value
            for value, dims in zip(values, self._other_dims, strict=True)
        ]
        return self._over_channels(torch.cat(along).to(self.dtype), torch.sum)

    def of(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the tensors of `names`, in this order."""
        return [tensors[name] for name in self.names]

    def spread(self, values: Tensor, outside: float) -> list[Tensor]:
        """Return `values` (n,) for each tensor of `names`, to broadcast against it; `outside` where no channel owns it.

        They are valid until the next call.
        """
        padded = F.pad(values.to(self.dtype), (0, 1), value=outside)
        torch.index_select(padded, 0, self._owner, out=self._spread)
        return self._views

    def scale_(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply the weights of each channel by its factor, in place."""
        multiply_(self.of(tensors), self.spread(factors, 1.0))

    def soften_(self, tensors: Mapping[str, Tensor], thresholds: Tensor) -> None:
        """Move every weight towards zero by its channel's threshold, and not beyond, in place (soft threshold)."""
        for mine, limits in _vectors_and_others(self.of(tensors), self.spread(thresholds, 0.0)):
            soft_threshold_(mine, limits)

    def _over_rest(self, tensors: Mapping[str, Tensor], order: float) -> Tensor:
        """Return the norm of this order over all dimensions but the channels', of all tensors joined."""
        along = [
            torch.linalg.vector_norm(tensor, order, dims, dtype=self.dtype) if dims else tensor
            for tensor, dims in zip(self.of(tensors), self._other_dims, strict=True)
        ]
        return torch.cat(along).to(self.dtype)

    def _over_channels(self, positions: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        parts = [
            reduce(positions.index_select(0, table.flatten()).view(table.shape), dim=1)
            for table in self._tables
        ]
        return parts[0] if self._order is None else torch.cat(parts).index_select(0, self._order)


def multiply_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by its factors, which broadcast against it, in place.

    Integer tensors (an 8-bit optimizer's state), and tensors on another device than their factors (an average of the
    weights), are multiplied one by one.
    """
    plain = [t.is_floating_point() and t.device == f.device for t, f in zip(tensors, factors, strict=True)]
    for tensor, factor, is_plain in zip(tensors, factors, plain, strict=True):
        if not is_plain:
            tensor.mul_(factor.to(tensor))
    if not all(plain):
        tensors = [tensor for tensor, is_plain in zip(tensors, plain, strict=True) if is_plain]
        factors = [factor for factor, is_plain in zip(factors, plain, strict=True) if is_plain]
    for some, their_factors in _vectors_and_others(tensors, factors):
        torch._foreach_mul_(some, their_factors)


def _vectors_and_others(
    tensors: Sequence[Tensor], values: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the tensors of one dimension, then the others: if one broadcasts, torch takes all of a call one by one."""
    for vectors in (True, False):
        chosen = [index for index, tensor in enumerate(tensors) if (tensor.dim() == 1) == vectors]
        if chosen:
            yield [tensors[index] for index in chosen], [values[index] for index in chosen]


def _tables(owner: np.ndarray, n: int) -> tuple[list[Tensor], Tensor | None]:
    """Return for each k the positions (channels, k) of the channels that own k, and the row of each channel.

    None instead of the rows if they are in order. Sums over a row have a fixed order, so all processes of a distributed
    run get the same bits. Adding into place on a GPU would not give that.
    """
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=n + 1)[:n]
    starts = np.cumsum(counts) - counts
    tables, channels = [], []
    for count in np.unique(counts):
        chosen = np.flatnonzero(counts == count)
        tables.append(torch.from_numpy(order[starts[chosen][:, None] + np.arange(count)]))
        channels.append(chosen)
    if len(tables) == 1:
        return tables, None
    return tables, torch.from_numpy(np.argsort(np.concatenate(channels)))
