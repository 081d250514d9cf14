from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from models_by_hand import build, random_masks

from sparsekit.analysis import find_groups
from sparsekit.errors import FileError, InputError
from sparsekit.groups import ChannelGroups
from sparsekit.plan import GroupCut, PrunePlan, TensorCut, make_plan


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
    assert plan.input_shapes == ((2, 3, 10, 10),)


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
        ({"inner": torch.rand(6)}, r"must be bool.*got float32"),  # scores, not masks
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


@pytest.mark.parametrize("data", [None, 3, "plan", [], {}, {"cuts": 1, "groups": [], "input_shapes": []}])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(FileError, match="this is no pruning plan"):
        PrunePlan.from_json(data)


@pytest.mark.parametrize("key", ["cuts", "groups", "input_shapes"])
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
