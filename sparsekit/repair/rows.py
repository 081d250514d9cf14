"""How a layer reads its input: as rows, one for each position, of columns, one for each weight of an output.

- "full": all that one output position reads. For a convolution these are channels x kernel columns, with its padding.
- "pointwise": one column for each input channel, at each position of the input. One prediction then serves every
  place of the kernel. It needs less memory. At the border of a padded map fewer places meet, so that a prediction there
  has no constant. It is taken for convolutions with too many columns or over three dimensions, for transposed ones, for
  layers that pad in a way of their own, and for linear layers that read many flattened maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.structure.counting import CONVOLUTIONS, TRANSPOSED
from sparsekit.structure.groups import ChannelGroups, Member
from sparsekit.surgery.constants import bias_is_exact

# A covariance of so many columns takes 46 MB.
MOST_COLUMNS = 2400


@dataclass(frozen=True)
class Reader:
    """How the layer with the weight `tensor` is read.

    - `columns` of each of its `conv_groups`.
    - `taps`: how many columns one index along the weight's input dimension has.
    - `maps`: how many indices of that dimension are one channel at several positions (a linear layer after a flatten).
    """

    tensor: str
    pointwise: bool
    conv_groups: int
    columns: int
    taps: int
    maps: int = 1

    @property
    def module(self) -> str:
        """Name of the layer."""
        return self.tensor.rpartition(".")[0]

    def columns_of(self, positions: Tensor) -> Tensor:
        """Return the columns (n, taps) of indices (n,) along the weight's input dimension."""
        if self.maps > 1:
            return (positions // self.maps)[:, None]
        return positions[:, None] * self.taps + torch.arange(self.taps, device=positions.device)

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the layer's weight as (conv_groups, outputs, columns), float64.

        Where one column serves several weights, each of them counts as an output.
        """
        weight = layer.weight
        assert isinstance(weight, Tensor)
        w = weight.detach().double()
        if isinstance(layer, TRANSPOSED):
            w = w.transpose(0, 1)
        if not self.pointwise:
            return w.reshape(self.conv_groups, w.shape[0] // self.conv_groups, -1)
        if self.maps > 1:
            return w.reshape(w.shape[0], -1, self.maps).permute(0, 2, 1).reshape(1, -1, self.columns)
        by_group = w.reshape(self.conv_groups, w.shape[0] // self.conv_groups, w.shape[1], -1)
        return by_group.permute(0, 1, 3, 2).reshape(self.conv_groups, -1, self.columns)

    def set_weight_(self, layer: nn.Module, new: Tensor) -> None:
        """Write back what `weight` returned, in place."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        shape = weight.transpose(0, 1).shape if isinstance(layer, TRANSPOSED) else weight.shape
        if not self.pointwise:
            w = new.reshape(shape)
        elif self.maps > 1:
            w = new.reshape(shape[0], self.maps, self.columns).permute(0, 2, 1).reshape(shape)
        else:
            outputs = shape[0] // self.conv_groups
            w = new.reshape(self.conv_groups, outputs, -1, self.columns).permute(0, 1, 3, 2).reshape(shape)
        with torch.no_grad():
            weight.copy_((w.transpose(0, 1) if isinstance(layer, TRANSPOSED) else w).to(weight))

    def affine(self, layer: nn.Module) -> bool:
        """Whether a constant in a column is one in the output: not where some positions see less of the kernel."""
        return not self.pointwise or bias_is_exact(layer)

    def bias_of(self, shift: Tensor, layer: nn.Module) -> Tensor:
        """Return what to add to the bias (outputs of the layer,), from (conv_groups, outputs)."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        outputs = weight.shape[1] if isinstance(layer, TRANSPOSED) else weight.shape[0]
        return shift.reshape(outputs, -1).sum(1)

    def per_output(self, matrix: Tensor, conv_group: int) -> Tensor:
        """Return the block of an (outputs, outputs) matrix that is of one conv_group."""
        n = matrix.shape[0] // self.conv_groups
        return matrix[conv_group * n : (conv_group + 1) * n, conv_group * n : (conv_group + 1) * n]

    def n_positions(self, layer: nn.Module, x: Tensor) -> int:
        """Return how many rows an image of x has."""
        if isinstance(layer, nn.Linear):
            return prod(x.shape[1:-1])
        return prod(x.shape[2:]) if self.pointwise else prod(_Window.of(layer, x).outputs)

    def rows(self, layer: nn.Module, x: Tensor, picked: Tensor | None = None) -> Tensor:
        """Return what the layer reads of x, as (images, positions, conv_groups, columns).

        With `picked`, the numbers of positions, in row-major order, only there.
        """
        if isinstance(layer, nn.Linear):
            rows = x.reshape(x.shape[0], -1, x.shape[-1])
            rows = rows if picked is None else rows[:, picked]
            if self.maps > 1:
                rows = rows.reshape(x.shape[0], -1, self.columns, self.maps).transpose(2, 3)
                rows = rows.reshape(x.shape[0], -1, self.columns)
            return rows[:, :, None]
        if self.pointwise:
            rows = x.flatten(2).mT
            rows = rows if picked is None else rows[:, picked]
        else:
            rows = _patches(layer, x, picked)
        return rows.reshape(*rows.shape[:2], self.conv_groups, -1)


def readers(
    groups: ChannelGroups, layers: dict[str, nn.Module], *, most_columns: int = MOST_COLUMNS
) -> dict[str, Reader]:
    """Return a reader by weight name for each of `layers` that can be repaired.

    `layers` are those that read channels of `groups` and use their weight as it is.
    """
    found = {}
    for tensor, layer in layers.items():
        members = [m for g in groups for m in g.of_role("consumer") if m.tensor == tensor]
        found[tensor] = _reader(tensor, layer, members, most_columns)
    return found


def _reader(tensor: str, layer: nn.Module, members: Sequence[Member], most_columns: int) -> Reader:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        n = weight.shape[1]
        maps = members[0].repeat if members else 1
        if n > most_columns and maps > 1 and n % maps == 0 and all(_in_maps(m, maps) for m in members):
            return Reader(tensor, True, 1, n // maps, 1, maps)
        return Reader(tensor, False, 1, n, 1)
    conv_groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, TRANSPOSED):
        return Reader(tensor, True, conv_groups, weight.shape[0] // conv_groups, 1)
    taps = prod(weight.shape[2:])
    in_full = (
        isinstance(layer, (nn.Conv1d, nn.Conv2d))
        and weight.shape[1] * taps <= most_columns
        and type(layer).forward in (nn.Conv1d.forward, nn.Conv2d.forward)
    )
    if in_full or (taps == 1 and isinstance(layer, CONVOLUTIONS)):
        return Reader(tensor, False, conv_groups, weight.shape[1] * taps, taps)
    return Reader(tensor, True, conv_groups, weight.shape[1], 1)


def _in_maps(member: Member, maps: int) -> bool:
    """Whether each channel has so many columns in a row: a map that was flattened behind its channels is apart."""
    rows = [member.positions[i : i + maps] for i in range(0, len(member.positions), maps)]
    return member.repeat == maps and all(
        row[0] % maps == 0 and row == tuple(range(row[0], row[0] + maps)) for row in rows
    )


@dataclass(frozen=True)
class _Window:
    """Where a convolution reads a padded map: in each dimension its kernel, steps, and how many outputs there are."""

    padding: list[int]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def of(layer: nn.Module, x: Tensor) -> _Window:
        assert isinstance(layer, CONVOLUTIONS)
        padding = list(layer._reversed_padding_repeated_twice)
        both = [padding[2 * d] + padding[2 * d + 1] for d in reversed(range(len(layer.kernel_size)))]
        sizes = zip(x.shape[2:], both, layer.kernel_size, layer.dilation, layer.stride, strict=True)
        outputs = tuple((n + more - d * (k - 1) - 1) // s + 1 for n, more, k, d, s in sizes)
        return _Window(padding, layer.kernel_size, layer.dilation, layer.stride, outputs)

    def places(self, shape: Sequence[int], picked: Tensor) -> Tensor:
        """Return which places of a padded map of this shape, flattened, the picked positions read: (picked, taps)."""
        corner = torch.zeros_like(picked)
        tap = torch.zeros(1, dtype=torch.int64, device=picked.device)
        axes = zip(
            torch.unravel_index(picked, self.outputs),
            shape,
            self.kernel,
            self.dilation,
            self.stride,
            strict=True,
        )
        for position, size, k, d, s in axes:
            corner = corner * size + position * s
            tap = (tap[:, None] * size + torch.arange(k, device=picked.device) * d).flatten()
        return corner[:, None] + tap


def _patches(layer: nn.Module, x: Tensor, picked: Tensor | None) -> Tensor:
    """Return what output positions of a convolution read: (images, positions, channels x kernel)."""
    assert isinstance(layer, CONVOLUTIONS)
    window = _Window.of(layer, x)
    if picked is None:
        picked = torch.arange(prod(window.outputs), device=x.device)
    if any(window.padding):
        x = F.pad(x, window.padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    places = window.places(x.shape[2:], picked)
    read = x.flatten(2).mT[:, places]  # (images, positions, taps, channels)
    return read.mT.flatten(2)
