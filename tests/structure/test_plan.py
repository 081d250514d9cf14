from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from models_by_hand import BY_HAND, build, random_masks
from torch import nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import FileError, InputError
from sparsekit.evaluation import flat_tensors
from sparsekit.structure.compose import compose
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.inputs import InputSpec
from sparsekit.structure.places import Place
from sparsekit.structure.plan import GroupCut, PrunePlan, TensorCut, make_plan
from sparsekit.surgery.cut import apply_plan


def groups_of(name: str) -> ChannelGroups:
    model, inputs = build(name)
    return find_groups(model, inputs)


def keep(n_channels: int, *kept: int) -> torch.Tensor:
    mask = torch.zeros(n_channels, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def test_the_indices_of_a_concatenation_are_those_written_out_by_hand() -> None:
    groups = groups_of("Concatenation")
    plan = make_plan(groups, {"left": keep(4, 0, 2), "right": keep(6, 1, 4, 5)})
    assert set(plan.cuts) == {
        TensorCut("left.weight", 0, "producer", keep=(0, 2), drop=(1, 3)),
        TensorCut("left.bias", 0, "producer", keep=(0, 2), drop=(1, 3)),
        TensorCut("right.weight", 0, "producer", keep=(1, 4, 5), drop=(0, 2, 3)),
        TensorCut("right.bias", 0, "producer", keep=(1, 4, 5), drop=(0, 2, 3)),
        # Both groups take from the same dimension: right's channels start at 4.
        TensorCut("reader.weight", 1, "consumer", keep=(0, 2, 5, 8, 9), drop=(1, 3, 4, 6, 7)),
    }
    assert len(plan.cuts) == 5
    assert plan.groups == (GroupCut("left", 4, (0, 2)), GroupCut("right", 6, (1, 4, 5)))
    assert plan.inputs.shapes == ((2, 3, 10, 10),)


def test_the_columns_behind_a_flatten_go_in_blocks() -> None:
    plan = make_plan(groups_of("FlattenBeforeLinear"), {"conv": keep(6, 1, 2, 3, 4)})
    (head,) = [cut for cut in plan.cuts if cut.tensor == "head.weight"]
    assert head.dim == 1
    assert head.drop == (*range(16), *range(80, 96))
    assert head.keep == tuple(range(16, 80))


def test_both_halves_of_a_gated_unit_go() -> None:
    plan = make_plan(groups_of("ChunkGate"), {"up": keep(6, 0, 1, 3, 4)})
    drops = {(cut.tensor, cut.dim): cut.drop for cut in plan.cuts}
    assert drops == {
        ("up.weight", 0): (2, 5, 8, 11),
        ("up.bias", 0): (2, 5, 8, 11),
        ("down.weight", 1): (2, 5),
    }


def test_masks_that_keep_everything_cut_nothing() -> None:
    groups = groups_of("Residual")
    plan = make_plan(groups, random_masks(groups, 1.0))
    assert plan.cuts == ()
    assert all(cut.kept == tuple(range(cut.n_channels)) for cut in plan.groups)
    assert make_plan(groups, {}).groups == ()


def test_a_frozen_group_may_be_named_as_long_as_it_stays_whole() -> None:
    groups = groups_of("Residual")
    (output,) = [g for g in groups if g.frozen]
    assert make_plan(groups, {output.name: torch.ones(4, dtype=torch.bool)}).cuts == ()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"inner": keep(5, 0)}, r"mask of inner must be bool with 6 entries.*\(5,\)"),
        ({"inner": torch.ones(6, 1, dtype=torch.bool)}, r"6 entries.*got bool of shape \(6, 1\)"),
        ({"inner": torch.rand(6)}, r"must be bool.*got float32"),  # importance, no mask
        ({"inner": torch.tensor([0, 2, 4, 1, 1, 1])}, r"must be bool.*got int64"),  # indices, not masks
        ({"inner": keep(6)}, r"keeps no channel"),
        ({"head": keep(4, 0)}, r"frozen: it reaches the model's output"),
        ({"inmer": keep(6, 0)}, r"'inmer', which the model does not have"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(masks: dict[str, torch.Tensor], message: str) -> None:
    groups = groups_of("Residual")
    groups = replace(groups, groups=tuple(_called("inner", "inner_norm", g) for g in groups))
    with pytest.raises(InputError, match=message):
        make_plan(groups, masks)


def _called(name: str, module: str, group: Any) -> Any:
    """The group under a name of the test's choice: its own is that of the layer that the graph came to first."""
    return replace(group, name=name) if module in {m.module for m in group.of_role("norm")} else group


@pytest.mark.parametrize("name", ["Residual", "ChunkGate", "FlattenBeforeLinear", "TwoInTwoOut"])
def test_a_plan_survives_json_text(name: str) -> None:
    groups = groups_of(name)
    plan = make_plan(groups, random_masks(groups, 0.5))
    assert plan.cuts
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False))) == plan


def a_plan() -> dict[str, Any]:
    groups = groups_of("Concatenation")
    plan: dict[str, Any] = json.loads(json.dumps(make_plan(groups, random_masks(groups, 0.5)).to_json()))
    return plan


@pytest.mark.parametrize("data", [None, 3, "plan", [], {}, {"cuts": 1, "groups": [], "inputs": {}}])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(FileError, match="this is no pruning plan"):
        PrunePlan.from_json(data)


@pytest.mark.parametrize("key", ["cuts", "groups", "inputs"])
def test_a_plan_that_lacks_a_key_is_refused(key: str) -> None:
    data = a_plan()
    del data[key]
    with pytest.raises(FileError, match=key):
        PrunePlan.from_json(data)


@pytest.mark.parametrize(
    "damage",
    [
        {"keep": [0, 1], "drop": [1, 2]},  # twice
        {"keep": [0, 1], "drop": [3]},  # a hole
        {"keep": ["0", "1"], "drop": []},
        {"keep": "01", "drop": ""},
        {"keep": None},
    ],
)
def test_a_plan_whose_positions_are_damaged_is_refused(damage: dict[str, Any]) -> None:
    data = a_plan()
    data["cuts"][0].update(damage)
    with pytest.raises(FileError, match="this is no pruning plan"):
        PrunePlan.from_json(data)


def test_equal_decisions_give_equal_plans_in_whatever_order_they_come() -> None:
    for name in ("Concatenation", "HierarchicalSplit", "DictionaryOfOutputs"):
        groups = groups_of(name)
        masks = random_masks(groups, 0.5)
        assert len(masks) > 1
        plan = make_plan(groups, masks)
        backwards = dict(reversed(masks.items()))
        assert make_plan(groups, backwards) == plan
        turned = replace(groups, groups=groups.groups[::-1])
        assert make_plan(turned, masks) == make_plan(turned, backwards) == plan


Decided = tuple[nn.Module, PrunePlan, nn.Module]


def decided(name: str, seed: int = 0, model: nn.Module | None = None) -> Decided:
    """A model (fresh if none is given), a plan that takes about a third of its units, and what the plan leaves."""
    fresh, inputs = build(name)
    model = model or fresh
    groups = find_groups(model, inputs)
    plan = make_plan(groups, random_masks(groups, 0.65, seed))
    return model, plan, apply_plan(model, plan)


def assert_equal_models(first: nn.Module, second: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Equal tensors, sizes and outputs, up to the rounding of what a response norm makes up for."""
    states = first.state_dict(), second.state_dict()
    assert {name: tensor.shape for name, tensor in states[0].items()} == {
        name: tensor.shape for name, tensor in states[1].items()
    }
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], rtol=1e-13, atol=0), name
    for one, other in zip(first.modules(), second.modules(), strict=True):
        sizes = [
            {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple, list))} for m in (one, other)
        ]
        assert sizes[0] == sizes[1]
    with torch.no_grad():
        ours, theirs = flat_tensors(first(*inputs)), flat_tensors(second(*inputs))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*BY_HAND, "test_vit", "test_resnet"])
def test_a_composed_plan_does_what_its_two_plans_do_one_after_the_other(name: str) -> None:
    model, first, once = decided(name)
    _, second, twice = decided(name, 1, once)
    both = compose(first, second)
    assert_equal_models(apply_plan(model, both), twice, build(name)[1])
    assert PrunePlan.from_json(json.loads(json.dumps(both.to_json()))) == both
    n_dropped = [sum(len(cut.drop) for cut in plan.cuts) for plan in (first, second, both)]
    assert n_dropped[0] + n_dropped[1] == n_dropped[2]


@pytest.mark.parametrize("name", ["Residual", "AttentionOfComputedSizes", "Windows", "test_resnet"])
def test_of_three_plans_any_two_neighbours_may_be_composed_first(name: str) -> None:
    _, first, once = decided(name)
    _, second, twice = decided(name, 1, once)
    _, third, _ = decided(name, 2, twice)
    assert first.cuts
    assert second.cuts
    assert third.cuts
    assert compose(compose(first, second), third) == compose(first, compose(second, third))


@pytest.mark.parametrize("name", ["Residual", "AttentionOfComputedSizes"])
def test_a_plan_that_cuts_nothing_leaves_the_other_as_it_is(name: str) -> None:
    _, plan, _ = decided(name)
    nothing = PrunePlan((), (), plan.inputs)
    assert plan.cuts
    assert compose(plan, nothing) == plan == compose(nothing, plan)


def test_composed_positions_are_those_of_the_uncut_model() -> None:
    first = TensorCut("left.weight", 0, "producer", keep=(0, 2, 3, 5), drop=(1, 4))
    second = TensorCut("left.weight", 0, "producer", keep=(1, 3), drop=(0, 2))
    other = TensorCut("head.weight", 1, "consumer", keep=(1,), drop=(0,))
    example = InputSpec.of(torch.zeros(1, 3, 8, 8))
    both = compose(
        PrunePlan((first,), (GroupCut("left", 6, (0, 2, 3, 5)),), example),
        PrunePlan((second, other), (GroupCut("left", 4, (1, 3)), GroupCut("head", 2, (1,))), InputSpec()),
    )
    assert both.cuts == (other, TensorCut("left.weight", 0, "producer", keep=(2, 5), drop=(0, 1, 3, 4)))
    assert both.groups == (GroupCut("head", 2, (1,)), GroupCut("left", 6, (2, 5)))
    assert both.inputs == example


def test_a_group_whose_units_are_counted_otherwise_after_the_first_cut_is_not_listed() -> None:
    plans = [PrunePlan((), (GroupCut("left", n, (0, 2)),), InputSpec()) for n in (4, 3)]
    assert compose(*plans).groups == ()


def test_the_rewritten_places_of_both_plans_are_kept() -> None:
    places = [Place("attention", "forward", call, 3, "0" * 64) for call in (0, 1, 2)]
    plans = [PrunePlan((), (), InputSpec(), rewrites) for rewrites in (tuple(places[1:]), tuple(places[:2]))]
    assert compose(*plans).rewrites == tuple(places)
    sized = [PrunePlan((), (), InputSpec(), (replace(places[0], size=size),)) for size in (8, 4)]
    assert compose(*sized).rewrites == sized[1].rewrites


def test_a_second_plan_that_does_not_fit_what_the_first_leaves_is_refused() -> None:
    _, plan, _ = decided("Residual")
    with pytest.raises(InputError, match=r"does not fit the first: it needs \S+ of size \d+ in dimension \d"):
        compose(plan, plan)


def with_a_dead_channel() -> tuple[nn.Module, torch.Tensor]:
    """Convolutions without biases; the first has a channel that is dead, so cutting it makes the second one's bias."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    )
    model = model.double().eval()
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0, 0.7
    return model, torch.randn(2, 3, 6, 6, dtype=torch.float64)


def cut_by_hand(model: nn.Module, images: torch.Tensor, masks: dict[str, torch.Tensor]) -> PrunePlan:
    return make_plan(find_groups(model, images), masks)


def test_a_bias_that_the_first_cut_made_is_cut_with_its_layer_by_the_composed_plan() -> None:
    model, images = with_a_dead_channel()
    first = cut_by_hand(model, images, {"0": keep(6, 0, 1, 3, 4, 5), "3": keep(5, 0, 1, 2, 3)})
    once = apply_plan(model, first)
    assert once[3].bias is not None
    second = cut_by_hand(once, images, {"3": keep(4, 0, 2)})
    assert "3.bias" in {cut.tensor for cut in second.cuts}
    assert_equal_models(apply_plan(model, compose(first, second)), apply_plan(once, second), (images,))


def test_a_bias_that_the_first_cut_made_is_cut_by_the_composed_plan_where_only_the_second_takes_its_rows() -> (
    None
):
    model, images = with_a_dead_channel()
    first = cut_by_hand(model, images, {"0": keep(6, 0, 1, 3, 4, 5)})
    once = apply_plan(model, first)
    second = cut_by_hand(once, images, {"3": keep(5, 0, 2)})
    assert "3.bias" in {cut.tensor for cut in second.cuts}
    assert_equal_models(apply_plan(model, compose(first, second)), apply_plan(once, second), (images,))


def test_a_second_cut_inside_the_one_block_that_the_first_left_is_composed() -> None:
    model, (images,) = build("GroupedConvOfFour")
    (grouped,) = find_groups(model, images).free
    first = make_plan(find_groups(model, images), {grouped.name: keep(4, 1)})
    once = apply_plan(model, first)
    groups = find_groups(once, images)
    second = make_plan(groups, {group.name: keep(group.n_channels, 0) for group in groups.free})
    assert second.cuts
    assert_equal_models(apply_plan(model, compose(first, second)), apply_plan(once, second), (images,))


def test_a_cut_of_blocks_that_the_first_plan_made_smaller_is_composed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 2, 1)
    )
    model, images = model.double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    first = cut_by_hand(model, images, {"0": keep(6, 0, 3), "2": keep(6, 1, 2)})  # in each of the four blocks
    once = apply_plan(model, first)
    second = cut_by_hand(once, images, {"0": keep(4, 0, 3)})  # whole blocks
    assert_equal_models(apply_plan(model, compose(first, second)), apply_plan(once, second), (images,))
