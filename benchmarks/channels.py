"""What a group lasso shrinks of a model, for benchmarks that do without our penalty: norms, and factors in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

import sparsekit as sk


class PenalisedChannels:
    """The penalised weights of every free group, channel by channel.

    Everything over channels is one vector (n,), group after group.
    """

    def __init__(self, model: nn.Module, groups: sk.ChannelGroups) -> None:
        self._tensors = dict(model.named_parameters())
        self._groups = [group for group in groups.free if group.penalised]
        self.sizes = self._sums(torch.ones_like)

    def norms(self) -> Tensor:
        """Euclidean norm of each channel's weights."""
        return self._sums(torch.square).sqrt()

    @torch.no_grad()
    def multiply_(self, factors: Tensor) -> None:
        """Multiply the weights of each channel by its factor, in place."""
        for tensor, factor in self.spread(factors):
            tensor.mul_(factor)

    def spread(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each penalised tensor, with its channels' values in a shape that goes with it; 1 where no channel is."""
        counts = [group.n_channels for group in self._groups]
        for group, own in zip(self._groups, values.split(counts), strict=True):
            for member in group.penalised:
                tensor = self._tensors[member.tensor]
                line = tensor.new_ones(tensor.shape[member.dim])
                line[list(member.positions)] = own.to(tensor).repeat_interleave(member.repeat)
                yield tensor, line.view([-1 if dim == member.dim else 1 for dim in range(tensor.dim())])

    def join(self, by_group: Mapping[str, Tensor]) -> Tensor:
        """One vector of what is by the names of groups."""
        return torch.cat([by_group[group.name] for group in self._groups])

    @torch.no_grad()
    def _sums(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Over all weights of each channel, of a function of every weight."""
        sums = []
        for group in self._groups:
            owned = [
                of(self._tensors[member.tensor]).movedim(member.dim, 0)[list(member.positions)]
                for member in group.penalised
            ]
            sums.append(torch.cat([one.reshape(group.n_channels, -1) for one in owned], 1).sum(1))
        return torch.cat(sums)
