"""Penalties act on exactly the positions a group owns, against loops over channels."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from sparsekit.options import Penalty
from sparsekit.sparsify.channel_vectors import OwnedWeights
from sparsekit.sparsify.penalties import distances_to_zero, penalised_members, shrink_
from sparsekit.structure.groups import ChannelGroup, Member

# Four channels: in order along rows; out of order along columns, among positions that are nobody's; two
# positions a channel; and a consumer, which no penalty touches.
GROUP = ChannelGroup(
    "group",
    4,
    (
        Member("rows", 0, (0, 1, 2, 3), 1, "producer", penalised=True),
        Member("columns", 1, (5, 0, 2, 3), 1, "producer", penalised=True),
        Member("pairs", 0, (0, 1, 2, 3, 4, 5, 6, 7), 2, "norm", penalised=True),
        Member("scattered_pairs", 0, (8, 0, 1, 2, 6, 5, 3, 4), 2, "norm", penalised=True),
        Member("consumer", 1, (0, 1, 2, 3), 1, "consumer"),
    ),
)


def _tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "rows": (4, 3, 2),
        "columns": (2, 7),
        "pairs": (8,),
        "scattered_pairs": (10, 2),
        "consumer": (3, 4),
    }
    return {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}


def _shrunk(
    tensors: dict[str, Tensor], penalty: Penalty = "group_lasso", group: ChannelGroup = GROUP
) -> OwnedWeights:
    return OwnedWeights(tensors, [group], lambda one: penalised_members(one, penalty))


def _owned(tensors: dict[str, Tensor], channel: int) -> list[tuple[Tensor, tuple[slice | int, ...]]]:
    """Every (tensor, index) of a channel, straight from the definition of `Member`."""
    places = []
    for member in GROUP.penalised:
        for position in member.positions[channel * member.repeat : (channel + 1) * member.repeat]:
            places.append((tensors[member.tensor], (*[slice(None)] * member.dim, position)))
    return places


def _channel_vector(tensors: dict[str, Tensor], channel: int) -> Tensor:
    return torch.cat([tensor[index].reshape(-1) for tensor, index in _owned(tensors, channel)])


def test_norms_sizes_and_distances_are_those_of_each_channel_as_one_vector() -> None:
    tensors = _tensors()
    shrunk = _shrunk(tensors)
    vectors = [_channel_vector(tensors, channel) for channel in range(4)]
    assert torch.allclose(shrunk.norms(tensors), torch.stack([v.norm() for v in vectors]))
    assert torch.equal(
        distances_to_zero(shrunk, tensors, "l1"), torch.stack([v.abs().max() for v in vectors])
    )
    assert torch.equal(distances_to_zero(shrunk, tensors, "group_lasso"), shrunk.norms(tensors))
    assert shrunk.sizes.tolist() == [len(vectors[0])] * 4 == [6 + 2 + 2 + 4] * 4


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
def test_a_step_shrinks_each_channel_by_its_own_threshold_and_nothing_else(penalty: str) -> None:
    tensors, expected = _tensors(), _tensors()
    thresholds = torch.tensor([0.0, 0.3, 1.1, 100.0]).double()
    for channel, t in enumerate(thresholds.tolist()):
        norm = float(_channel_vector(expected, channel).norm())
        for tensor, index in _owned(expected, channel):
            old = tensor[index].clone()
            tensor[index] = (
                old * max(1 - t / norm, 0)
                if penalty == "group_lasso"
                else old.sign() * (old.abs() - t).relu()
            )
    shrink_(_shrunk(tensors), tensors, penalty, thresholds)
    for name in tensors:
        assert torch.allclose(tensors[name], expected[name], atol=1e-14), name
    assert bool((_channel_vector(tensors, 3) == 0).all())
    untouched = _tensors()
    assert torch.equal(tensors["consumer"], untouched["consumer"])
    assert torch.equal(_channel_vector(tensors, 0), _channel_vector(untouched, 0))
    assert torch.equal(tensors["columns"][:, [1, 4, 6]], untouched["columns"][:, [1, 4, 6]])


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
def test_the_distance_to_zero_is_the_smallest_threshold_that_kills(penalty: str) -> None:
    for factor, dies in ((1 - 1e-9, False), (1 + 1e-9, True)):
        tensors = _tensors()
        shrunk = _shrunk(tensors)
        thresholds = distances_to_zero(shrunk, tensors, penalty) * factor
        shrink_(shrunk, tensors, penalty, thresholds)
        assert bool(((shrunk.norms(tensors) == 0) == dies).all())


def test_a_sparse_group_lasso_spends_half_on_single_weights_and_half_on_the_vector() -> None:
    tensors, expected = _tensors(), _tensors()
    thresholds = torch.tensor([0.0, 0.3, 1.1, 100.0]).double()
    for channel, t in enumerate(thresholds.tolist()):
        vector = _channel_vector(expected, channel)
        soft = vector.sign() * (vector.abs() - t / 2 / len(vector) ** 0.5).relu()
        factor = max(1 - t / 2 / max(float(soft.norm()), 1e-300), 0)
        for tensor, index in _owned(expected, channel):
            old = tensor[index].clone()
            tensor[index] = old.sign() * (old.abs() - t / 2 / len(vector) ** 0.5).relu() * factor
    shrunk = _shrunk(tensors, "sparse_group_lasso")
    lowest = distances_to_zero(shrunk, tensors, "sparse_group_lasso")
    shrink_(shrunk, tensors, "sparse_group_lasso", thresholds)
    for name in tensors:
        assert torch.allclose(tensors[name], expected[name], atol=1e-14), name
    again = _tensors()
    shrink_(shrunk, again, "sparse_group_lasso", lowest * (1 - 1e-9))
    assert bool((shrunk.norms(again) > 0).all())
    one_hot = {name: torch.zeros_like(tensor) for name, tensor in again.items()}
    one_hot["rows"][:, 0, 0] = 3.0
    exact = distances_to_zero(shrunk, one_hot, "sparse_group_lasso")
    shrink_(shrunk, one_hot, "sparse_group_lasso", exact * torch.tensor([0.99, 0.99, 1.01, 1.01]))
    assert (shrunk.norms(one_hot) > 0).tolist() == [True, True, False, False]


def test_mcp_takes_small_channels_to_zero_and_leaves_large_ones_as_they_are() -> None:
    tensors, before = _tensors(), _tensors()
    shrunk = _shrunk(tensors, "group_mcp")
    norms = shrunk.norms(tensors)
    # strength x weight of each channel: three times that is the norm from which nothing shrinks.
    strengths = torch.stack([norms[0] / 3.001, norms[1] / 2.999, norms[2] * 10.001, norms[3] * 9.999])
    shrink_(shrunk, tensors, "group_mcp", strengths * 0.1, rate=0.1)
    after = shrunk.norms(tensors)
    assert torch.equal(_channel_vector(tensors, 0), _channel_vector(before, 0))
    assert 0.999 * norms[1] < after[1] < norms[1]
    assert after[2] == 0
    assert 0 < after[3] < 0.01 * norms[3]


def test_scale_l1_acts_on_the_scales_of_norms_alone() -> None:
    members = (
        Member("conv.weight", 0, (0, 1), 1, "producer", norm="norm"),
        Member("norm.weight", 0, (0, 1), 1, "norm", penalised=True),
        Member("norm.bias", 0, (0, 1), 1, "norm", penalised=True),
        Member("plain.weight", 0, (0, 1), 1, "producer", penalised=True),
    )
    group = ChannelGroup("g", 2, members)
    assert [m.tensor for m in penalised_members(group, "scale_l1")] == ["norm.weight"]
    assert penalised_members(group, "l1") == group.penalised
    tensors = {"norm.weight": torch.tensor([0.5, -2.0]), "norm.bias": torch.tensor([1.0, 1.0])}
    shrunk = _shrunk(tensors, "scale_l1", group)
    assert distances_to_zero(shrunk, tensors, "scale_l1").tolist() == [0.5, 2.0]
    shrink_(shrunk, tensors, "scale_l1", torch.tensor([0.6, 0.5]))
    assert tensors["norm.weight"].tolist() == [0.0, -1.5]
    assert tensors["norm.bias"].tolist() == [1.0, 1.0]


def test_scaling_multiplies_each_channel_and_leaves_other_positions() -> None:
    tensors, before = _tensors(), _tensors()
    factors = torch.tensor([1.0, 0.0, 2.0, -1.0])  # float32 on float64 tensors
    _shrunk(tensors).scale_(tensors, factors)
    for channel, factor in enumerate(factors.tolist()):
        assert torch.equal(_channel_vector(tensors, channel), _channel_vector(before, channel) * factor)
    assert torch.equal(tensors["columns"][:, [1, 4, 6]], before["columns"][:, [1, 4, 6]])
    assert torch.equal(tensors["scattered_pairs"][[7, 9]], before["scattered_pairs"][[7, 9]])


def test_low_precision_weights_keep_their_type() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in _tensors().items()}
    shrunk = _shrunk(tensors)
    for penalty in get_args(Penalty):
        shrink_(shrunk, tensors, penalty, torch.full((4,), 0.1))
    shrunk.scale_(tensors, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(shrunk.norms(tensors) == 0, torch.tensor([False, True, False, False]))
