"""A layer's rows times its weight are what it puts out: what is repaired is what the layer computes."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from sparsekit.repair.rows import Reader, readers
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member

BATCH = 3


def reader_of(
    layer: nn.Module, *, repeat: int = 1, positions: tuple[int, ...] | None = None, **options: int
) -> Reader:
    dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    size = layer.weight.shape[dim]
    positions = tuple(range(size)) if positions is None else positions
    group = ChannelGroup("g", size // repeat, (Member("layer.weight", dim, positions, repeat, "consumer"),))
    return readers(ChannelGroups((group,), ()), {"layer.weight": layer}, **options)["layer.weight"]


def by_rows(reader: Reader, layer: nn.Module, x: Tensor) -> Tensor:
    """The output as (images, positions, outputs)."""
    rows = reader.rows(layer, x)
    found = torch.einsum("npgk,gok->npgo", rows, reader.weight(layer)).flatten(2)
    return found if layer.bias is None else found + layer.bias


FULL = [
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4), (5, 6)),
    (nn.Linear(6, 4), (2, 5, 6)),
    (nn.Conv2d(6, 4, 1), (6, 5, 4)),
    (nn.Conv2d(6, 4, 1, stride=2, bias=False), (6, 5, 4)),
    (nn.Conv2d(6, 4, 1, padding=1), (6, 5, 4)),
    (nn.Conv2d(6, 4, 1, padding=1, padding_mode="replicate"), (6, 5, 4)),
    (nn.Conv2d(6, 4, 3), (6, 5, 4)),
    (nn.Conv2d(6, 4, 3, padding=1), (6, 5, 4)),
    (nn.Conv2d(6, 4, (3, 2), padding=(2, 0), stride=(2, 1)), (6, 7, 5)),
    (nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(2, 1)), (6, 7, 5)),
    (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (6, 5, 4)),
    (nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 5, 4)),
    (nn.Conv1d(6, 4, 3, padding=2, dilation=2, stride=2), (6, 9)),
    (nn.Conv1d(6, 4, 1), (6, 9)),
    (nn.Conv1d(6, 4, 3, groups=2, padding="same"), (6, 9)),
    (nn.Conv3d(6, 4, 1, stride=(1, 2, 1)), (6, 3, 4, 5)),
    (Conv2dSame(6, 4, 1, stride=2), (6, 5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), FULL, ids=lambda value: str(value).replace(" ", ""))
def test_rows_times_the_weight_are_the_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    x = torch.randn(BATCH, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reader = reader_of(layer)
    assert not reader.pointwise
    wanted = layer(x)
    if isinstance(layer, nn.Linear):
        wanted = wanted.reshape(BATCH, -1, wanted.shape[-1])
    else:
        wanted = wanted.flatten(2).transpose(1, 2)
    assert torch.allclose(by_rows(reader, layer, x), wanted)


POINTWISE = [
    nn.Conv2d(6, 4, 3, padding=1),
    nn.Conv2d(6, 4, (3, 2), groups=2),
    nn.Conv1d(6, 4, 3),
    nn.Conv3d(6, 4, 2),
    nn.ConvTranspose2d(6, 4, 3),
    Conv2dSame(6, 4, 3, stride=2),
    nn.Linear(24, 4),
]


@pytest.mark.parametrize("layer", POINTWISE, ids=str)
def test_a_weight_is_written_back_as_it_was_read(layer: nn.Module) -> None:
    repeat = 4 if isinstance(layer, nn.Linear) else 1
    for most_columns in (1, 2400):
        reader = reader_of(layer, repeat=repeat, most_columns=most_columns)
        before = layer.weight.detach().clone()
        weight = reader.weight(layer)
        assert weight.shape == (reader.conv_groups, weight.shape[1], reader.columns)
        with torch.no_grad():
            layer.weight.zero_()
        reader.set_weight_(layer, weight)
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("layer", POINTWISE, ids=str)
def test_each_column_of_a_pointwise_reader_is_one_input_channel(layer: nn.Module) -> None:
    """Without the columns of a channel the layer no longer depends on it, and on all others as before."""
    layer = layer.double()
    repeat = 4 if isinstance(layer, nn.Linear) else 1
    reader = reader_of(layer, repeat=repeat, most_columns=1)
    assert reader.pointwise
    spatial = {nn.Conv1d: (5,), nn.Conv3d: (4, 4, 4)}.get(type(layer), (5, 5))
    shape = (BATCH, 24) if isinstance(layer, nn.Linear) else (BATCH, 6, *spatial)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    without = x.clone()
    per_conv_group = 6 // reader.conv_groups
    gone = [c for c in range(6) if c % per_conv_group == 1]
    without.reshape(BATCH, 6, -1)[:, gone] = 0
    weight = reader.weight(layer)
    wanted = layer(without)
    weight[:, :, reader.columns_of(torch.arange(repeat, 2 * repeat)).flatten()] = 0
    reader.set_weight_(layer, weight)
    assert torch.allclose(layer(x), wanted)
    rows = reader.rows(layer, x)
    assert rows.shape[2:] == (reader.conv_groups, reader.columns)
    assert torch.equal(rows.flatten(2).transpose(1, 2).reshape(x.shape), x)


def test_flattened_maps_are_one_column_only_where_they_lie_together() -> None:
    """After channels_last.flatten a channel's positions are apart."""
    layer = nn.Linear(24, 4)
    together, apart = tuple(range(24)), tuple(c + 6 * i for c in range(6) for i in range(4))
    assert reader_of(layer, repeat=4, positions=together, most_columns=1).maps == 4
    assert not reader_of(layer, repeat=4, positions=apart, most_columns=1).pointwise
