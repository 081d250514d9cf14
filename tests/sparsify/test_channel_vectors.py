"""Channels of several groups as one vector, against loops over groups, channels and positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsekit.sparsify.channel_vectors import ChannelNumbers, Largest, OwnedWeights, multiply_
from sparsekit.structure.groups import ChannelGroup, Member


def _member(tensor: str, positions: tuple[int, ...], dim: int = 0, repeat: int = 1) -> Member:
    return Member(tensor, dim, positions, repeat, "producer", penalised=True)


# Two groups that own parts of one tensor, one that owns another along its columns, in pairs and out of order, and one
# of a single channel. Each channel of the first owns one position, of the second three, of the third four.
GROUPS = (
    ChannelGroup("one", 3, (_member("shared", (4, 0, 2)),)),
    ChannelGroup("three", 2, (_member("shared", (1, 5)), _member("vector", (0, 1)), _member("cube", (1, 0)))),
    ChannelGroup("four", 2, (_member("wide", (6, 5, 0, 1), 1, 2), _member("pairs", (0, 1, 2, 3), 0, 2))),
    ChannelGroup("single", 1, (_member("last", (0,)),)),
)
SHAPES = {"shared": (7,), "vector": (2,), "cube": (2, 3, 2), "wide": (3, 7), "pairs": (4,), "last": (1, 2)}


def _tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def _owned(tensors: dict[str, Tensor]) -> OwnedWeights:
    return OwnedWeights(tensors, GROUPS, lambda group: group.penalised)


def _places() -> list[list[tuple[str, int, int]]]:
    """(tensor, dimension, position) of each channel, from the definition of `Member`."""
    return [
        [
            (member.tensor, member.dim, position)
            for member in group.members
            for position in member.positions[channel * member.repeat : (channel + 1) * member.repeat]
        ]
        for group in GROUPS
        for channel in range(group.n_channels)
    ]


def _vectors(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [
        torch.cat([tensors[name].select(dim, position).reshape(-1) for name, dim, position in places])
        for places in _places()
    ]


def test_numbers_over_what_each_channel_owns() -> None:
    tensors = _tensors()
    owned, vectors = _owned(tensors), _vectors(tensors)
    assert owned.sizes.tolist() == [len(vector) for vector in vectors]
    expected = {
        "norms": [vector.norm() for vector in vectors],
        "largest": [vector.abs().max() for vector in vectors],
        "absolute_sums": [vector.abs().sum() for vector in vectors],
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(owned, name)(tensors), torch.stack(values), msg=name)
    sums = owned.sums([tensors[name] for name in owned.names])
    torch.testing.assert_close(sums, torch.stack([vector.sum() for vector in vectors]))


@pytest.mark.parametrize("change", ["scale", "soften"])
def test_changes_reach_what_a_channel_owns_and_nothing_else(change: str) -> None:
    tensors, expected = _tensors(), _tensors()
    owned = _owned(tensors)
    values = torch.tensor([0.0, 0.5, 1.0, 0.3, 100.0, torch.inf if change == "soften" else 3.0, 0.2, 0.7])
    for places, value in zip(_places(), values.double(), strict=True):
        for name, dim, position in places:
            part = expected[name].select(dim, position)
            softer = part.sign() * (part.abs() - value).relu()
            part.copy_(softer if change == "soften" else part * value)
    if change == "scale":
        owned.scale_(tensors, values)
    else:
        owned.soften_(tensors, values)
    for name in tensors:
        torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=1e-14, msg=name)
    assert torch.equal(tensors["shared"][[3, 6]], _tensors()["shared"][[3, 6]])
    assert torch.equal(tensors["wide"][:, 2:5], _tensors()["wide"][:, 2:5])


def test_sums_of_low_precision_weights_are_made_in_float32() -> None:
    tensors = _tensors(torch.bfloat16)
    exact = [vector.double().norm() for vector in _vectors(tensors)]
    norms = _owned(tensors).norms(tensors)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), torch.stack(exact), rtol=1e-6, atol=0)


def test_the_largest_are_found_group_by_group() -> None:
    numbers = ChannelNumbers(GROUPS)
    values = torch.tensor([0.3, 0.1, 0.2, 5.0, 5.0, -1.0, -torch.inf, -3.0])
    best = Largest(numbers, [2, 1, 7, 0], torch.device("cpu"))(values)
    named = sorted(index for index in best.tolist() if index < numbers.n)
    assert named in ([0, 2, 3, 5, 6], [0, 2, 4, 5, 6])


def test_joining_is_the_inverse_of_splitting() -> None:
    numbers = ChannelNumbers(GROUPS)
    flat = torch.arange(8.0)
    parts = numbers.split(flat)
    assert {name: len(part) for name, part in parts.items()} == {"one": 3, "three": 2, "four": 2, "single": 1}
    assert torch.equal(numbers.join(parts), flat)
    assert numbers.join({"three": 2.0, "single": torch.ones(1)}).tolist() == [0, 0, 0, 2, 2, 0, 0, 1]


def test_whole_numbers_are_multiplied_too() -> None:
    """As the state of an 8-bit optimizer is."""
    state = [torch.tensor([3, 4, 5], dtype=torch.uint8), torch.tensor([1.0, 2.0, 3.0])]
    multiply_(state, [torch.tensor([1.0, 0.0, 1.0])] * 2)
    assert state[0].tolist() == [3, 0, 5]
    assert state[1].tolist() == [1.0, 0.0, 3.0]
