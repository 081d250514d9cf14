"""Groups formed of hand-made observations, and what holds of the groups of any model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from models_by_hand import BY_HAND, build
from torch import Tensor

from sparsekit.coupling.find_groups import find_groups
from sparsekit.coupling.form_groups import form_groups
from sparsekit.coupling.observations import Observations, SizeUse
from sparsekit.coupling.solve import solve
from sparsekit.structure.groups import ChannelGroup, Member
from sparsekit.structure.places import Attribute, Place


class Pass:
    """What a pass through layers would show, noted by hand."""

    def __init__(self) -> None:
        self.seen = Observations()

    def axis(self, tensor: str, dim: int, size: int, what: str = "") -> Tensor:
        first = self.seen.add_axis(tensor, dim, size).first
        labels = torch.arange(first, first + size, dtype=torch.float32)
        if what:
            self.seen.note(what, labels)  # type: ignore[arg-type]
        return labels

    def layer(self, name: str, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
        """Rows, with the bias, and columns."""
        rows = self.axis(f"{name}.weight", 0, n_out, "producer")
        columns = self.axis(f"{name}.weight", 1, n_in, "consumer")
        self.seen.couple(rows, self.axis(f"{name}.bias", 0, n_out, "producer"))
        return rows, columns

    def groups(self, *parameters: str) -> dict[str, ChannelGroup]:
        names = set(parameters) or {axis.tensor for axis in self.seen.axes}
        return {group.name: group for group in form_groups(self.seen, solve(self.seen), names)}


def positions(group: ChannelGroup) -> dict[tuple[str, int], tuple[tuple[int, ...], int]]:
    return {(m.tensor, m.dim): (m.positions, m.repeat) for m in group.members}


def test_what_one_layer_makes_and_the_next_reads_is_a_group_named_after_the_first() -> None:
    traced = Pass()
    rows, images = traced.layer("conv", 4, 3)
    outputs, columns = traced.layer("head", 2, 4)
    traced.seen.couple(rows, columns)
    traced.seen.fix(images, "it reads the images")
    traced.seen.fix(outputs, "it reaches the output")
    groups = traced.groups()
    # The columns that read the images are made by no layer.
    assert {name: (g.n_channels, g.frozen) for name, g in groups.items()} == {
        "conv": (4, ""),
        "head": (2, "it reaches the output"),
    }
    every = ((0, 1, 2, 3), 1)
    assert positions(groups["conv"]) == {
        ("conv.weight", 0): every,
        ("conv.bias", 0): every,
        ("head.weight", 1): every,
    }
    assert [m.role for m in groups["conv"].members] == ["producer", "producer", "consumer"]
    assert [m.penalised for m in groups["conv"].members] == [True, True, False]


def test_channels_are_numbered_by_their_place_in_the_first_layer_whatever_order_they_are_read_in() -> None:
    traced = Pass()
    rows, _ = traced.layer("conv", 4, 3)
    _, columns = traced.layer("head", 2, 4)
    traced.seen.couple(rows, columns[[2, 0, 3, 1]])
    assert positions(traced.groups()["conv"])["head.weight", 1] == ((2, 0, 3, 1), 1)


def test_a_tensor_that_no_layer_makes_does_not_number_the_channels_even_if_it_is_met_first() -> None:
    traced = Pass()
    scale = traced.axis("scale", 0, 4, "factor")
    rows, _ = traced.layer("conv", 4, 3)
    traced.seen.couple(scale[[2, 0, 3, 1]], rows)
    group = traced.groups()["conv"]
    assert positions(group)["conv.weight", 0] == ((0, 1, 2, 3), 1)
    assert positions(group)["scale", 0] == ((2, 0, 3, 1), 1)


def test_positions_that_go_together_are_listed_channel_by_channel() -> None:
    traced = Pass()
    rows, _ = traced.layer("conv", 2, 3)
    _, columns = traced.layer("head", 2, 6)
    traced.seen.couple(rows.reshape(2, 1), columns.reshape(2, 3))
    assert positions(traced.groups()["conv"])["head.weight", 1] == ((0, 1, 2, 3, 4, 5), 3)
    other = Pass()
    rows, _ = other.layer("conv", 2, 3)
    _, columns = other.layer("head", 2, 6)
    other.seen.couple(rows.reshape(1, 2), columns.reshape(3, 2))
    assert positions(other.groups()["conv"])["head.weight", 1] == ((0, 2, 4, 1, 3, 5), 3)


def test_channels_that_run_through_other_tensors_are_a_group_of_their_own() -> None:
    traced = Pass()
    rows, _ = traced.layer("conv", 5, 3)
    _, columns = traced.layer("head", 2, 2)
    traced.seen.couple(rows[3:], columns)
    groups = traced.groups()
    assert {name: g.n_channels for name, g in groups.items()} == {"conv": 3, "conv#2": 2, "head": 2}
    assert positions(groups["conv"])["conv.weight", 0] == ((0, 1, 2), 1)
    assert positions(groups["conv#2"])["conv.weight", 0] == ((3, 4), 1)


def test_channels_that_must_stay_for_different_reasons_are_groups_of_their_own() -> None:
    traced = Pass()
    rows, _ = traced.layer("conv", 5, 3)
    traced.seen.fix(rows[:2], "one reason")
    traced.seen.fix(rows[2:4], "another reason")
    found = [(g.n_channels, g.frozen) for g in traced.groups().values()]
    assert found == [(2, "one reason"), (2, "another reason"), (1, "")]


def test_groups_come_in_the_order_in_which_the_pass_met_their_layers() -> None:
    traced = Pass()
    for name in ("third", "first", "second"):
        traced.layer(name, 3, 3)
    assert list(traced.groups()) == ["third", "first", "second"]


def test_a_layer_that_only_a_normalisation_reads_is_judged_by_its_scale_and_shift() -> None:
    traced = Pass()
    rows, _ = traced.layer("conv", 4, 3)
    for name in ("weight", "bias", "running_mean"):
        traced.seen.couple(rows, traced.axis(f"norm.{name}", 0, 4, "norm"))
    parameters = ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
    for readers, norm in (
        ({"norm.weight"}, "norm"),
        ({"norm.weight", ""}, None),
        ({"norm.weight", "other"}, None),
    ):
        traced.seen.norms["conv.weight"] = readers
        group = traced.groups(*parameters)["conv"]
        assert {m.norm for m in group.of_role("producer")} == {norm}
        scales = {"norm.weight", "norm.bias"}
        assert {m.tensor for m in group.penalised} == scales | (
            set() if norm else {"conv.weight", "conv.bias"}
        )


@pytest.mark.parametrize(
    ("what", "role", "penalised"),
    [
        ("producer", "producer", True),
        ("depthwise", "depthwise", True),
        ("consumer", "consumer", False),
        ("norm", "norm", True),
        ("factor", "parameter", False),
        ("", "parameter", True),
    ],
)
def test_what_was_noted_of_a_tensor_is_its_role(what: str, role: str, penalised: bool) -> None:
    traced = Pass()
    rows, _ = traced.layer("conv", 4, 3)
    traced.seen.couple(rows, traced.axis("other", 0, 4, what))
    (member,) = [m for m in traced.groups()["conv"].members if m.tensor == "other"]
    assert (member.role, member.penalised) == (role, penalised)


def test_a_gate_is_a_member_apart_and_not_penalised() -> None:
    traced = Pass()
    rows, _ = traced.layer("up", 6, 3)
    traced.seen.couple(rows[:3], rows[3:])
    traced.seen.note("gate", rows[3:])
    members = [m for m in traced.groups()["up"].members if m.tensor == "up.weight"]
    assert [(m.positions, m.penalised) for m in members] == [((0, 1, 2), True), ((3, 4, 5), False)]


def test_a_tensor_that_is_not_trained_is_not_penalised() -> None:
    traced = Pass()
    traced.layer("conv", 4, 3)
    assert {m.tensor for m in traced.groups("conv.weight")["conv"].penalised} == {"conv.weight"}


def test_attributes_that_size_the_channels_are_members_by_their_entries() -> None:
    traced = Pass()
    rows, _ = traced.layer("conv", 4, 3)
    slices = rows.long().numpy().reshape(4, 1)
    attributes = (Attribute("blocks.0", "num_heads"), Attribute("", "sizes", 2))
    traced.seen.sizes += [SizeUse(attribute, slices) for attribute in attributes]
    sizes = traced.groups()["conv"].of_role("size")
    assert sizes == (
        Member("blocks.0.num_heads", 0, (0, 1, 2, 3), 1, "size"),
        Member("sizes", 2, (0, 1, 2, 3), 1, "size"),
    )


def test_an_attribute_that_sizes_two_groups_has_a_part_in_each() -> None:
    traced = Pass()
    left, right = traced.layer("left", 2, 3)[0], traced.layer("right", 3, 3)[0]
    both = torch.cat([left, right]).long().numpy().reshape(5, 1)
    traced.seen.sizes.append(SizeUse(Attribute("", "width"), both))
    groups = traced.groups()
    assert [groups[name].of_role("size")[0].positions for name in ("left", "right")] == [(0, 1), (2, 3, 4)]


def test_a_group_has_the_places_in_code_that_size_its_channels() -> None:
    traced = Pass()
    left, right = traced.layer("left", 2, 3)[0], traced.layer("right", 3, 3)[0]
    places = [Place("attention", "forward", call, 2, "0" * 64) for call in range(2)]
    traced.seen.places += [(place, np.unique(left.long().numpy())) for place in reversed(places)]
    assert [traced.groups()[name].rewrites for name in ("left", "right")] == [tuple(places), ()]
    assert len(right)


# -------------------------------------------------------------------------------- groups of any model


@pytest.mark.parametrize("name", [*BY_HAND, "test_vit", "test_efficientnet"])
def test_groups_of_any_model_are_consistent(name: str) -> None:
    model, inputs = build(name)
    groups = find_groups(model, inputs)
    sizes = {**groups.tensor_shapes, **groups.attributes}
    assert len({group.name for group in groups}) == len(groups)
    claims: Counter[tuple[str, int, int]] = Counter()
    for group in groups:
        assert group.of_role("producer") or group.of_role("depthwise")
        for member in group.members:
            assert len(member.positions) == group.n_channels * member.repeat
            assert member.repeat >= 1
            assert set(member.positions) <= set(range(sizes[member.tensor][member.dim]))
            claims.update((member.tensor, member.dim, position) for position in member.positions)
            for channel in range(group.n_channels):
                own = member.positions[channel * member.repeat : (channel + 1) * member.repeat]
                assert list(own) == sorted(own)
    assert set(claims.values()) == {1}


@pytest.mark.parametrize("name", [*BY_HAND, "test_vit", "test_efficientnet"])
def test_every_row_of_every_layer_belongs_to_a_group_free_or_frozen(name: str) -> None:
    model, inputs = build(name)
    claimed: dict[str, set[int]] = {}
    for group in find_groups(model, inputs):
        for member in (*group.of_role("producer"), *group.of_role("depthwise")):
            claimed.setdefault(member.tensor, set()).update(member.positions)
    for key, module in model.named_modules():
        weight = f"{key}.weight"
        transposed = isinstance(module, torch.nn.modules.conv._ConvTransposeNd)
        if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
            parameter = module.weight
            tied = [k for k, v in model.named_parameters(remove_duplicate=False) if v is parameter]
            assert any(len(claimed.get(k, ())) == parameter.shape[transposed] for k in tied), weight
