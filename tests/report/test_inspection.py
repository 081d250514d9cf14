"""What inspect shows agrees with the model, counted by hand."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict

import pytest
import timm
import torch
from models_by_hand import build
from rich.console import Console
from torch import nn

from sparsekit.report.inspection import Inspection, _compact, inspect_module
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, LayerCost, Member
from sparsekit.structure.inputs import InputSpec


def _inspect(ignore: tuple[str, ...] = ()) -> Inspection:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 25, 2),
    )
    return inspect_module("[small]", model, torch.zeros(1, 3, 5, 5), ignore)


def test_totals_and_shares_are_those_counted_by_hand() -> None:
    found = _inspect().to_json()
    macs = {"0": 4 * 3 * 9 * 25, "3": 4 * 6 * 25, "5": 6 * 25 * 2}
    params = {"0": 4 * 3 * 9, "1": 2 * 4, "3": 4 * 6, "5": 6 * 25 * 2 + 2}
    assert (found["model"], found["input_shape"]) == ("[small]", [3, 5, 5])
    assert found["macs"] == sum(macs.values())
    assert found["params"] == sum(params.values())
    rows = {row["name"]: row for row in found["groups"]}
    assert {name: (row["channels"], row["layers"]) for name, row in rows.items()} == {
        "0": (4, ["0"]),
        "3": (6, ["3"]),
        "5": (2, ["5"]),
    }
    assert rows["0"]["macs_share"] == pytest.approx((macs["0"] + macs["3"]) / found["macs"])
    assert rows["0"]["params_share"] == pytest.approx(
        (params["0"] + params["1"] + params["3"]) / found["params"]
    )
    # The last bias does not shrink with the channels before it.
    assert rows["3"]["params_share"] == pytest.approx((params["3"] + params["5"] - 2) / found["params"])
    assert [bool(row["frozen"]) for row in found["groups"]] == [row["name"] == "5" for row in found["groups"]]


def test_of_a_layer_that_two_groups_share_each_owns_its_columns() -> None:
    model, (images,) = build("Concatenation")
    found = inspect_module("both", model, images[:1]).to_json()
    rows = {row["name"]: row for row in found["groups"]}
    positions = 10 * 10
    left, right, reader = 4 * 3 * 9 * positions, 6 * 3 * positions, 5 * 10 * 9 * positions
    assert rows["left"]["macs_share"] * found["macs"] == pytest.approx(left + reader * 4 / 10)
    assert rows["right"]["macs_share"] * found["macs"] == pytest.approx(right + reader * 6 / 10)
    params = 6 * 3 + 6 + 5 * 6 * 9
    assert rows["right"]["params_share"] * found["params"] == pytest.approx(params)


def test_members_are_named_with_what_each_channel_has_in_them() -> None:
    model, (features,) = build("ChunkGate")
    (free,) = (
        row for row in inspect_module("gate", model, features[:1]).to_json()["groups"] if not row["frozen"]
    )
    assert (free["channels"], free["rows_per_channel"]) == (6, 2)
    assert free["members"] == [
        {"tensor": "up.weight", "dim": 0, "role": "producer", "per_channel": 2},
        {"tensor": "up.bias", "dim": 0, "role": "producer", "per_channel": 2},
        {"tensor": "down.weight", "dim": 1, "role": "consumer", "per_channel": 1},
    ]


def test_members_account_for_every_position_of_a_group() -> None:
    for name in ("AttentionOfNamedSizes", "GroupedConv", "FlattenBeforeLinear", "Residual"):
        model, inputs = build(name)
        inspection = inspect_module(name, model, inputs[0])
        for row in inspection.to_json()["groups"]:
            owned: dict[tuple[str, int], int] = defaultdict(int)
            for member in inspection.groups[row["name"]].members:
                owned[member.tensor, member.dim] += len(member.positions)
            counted = {(m["tensor"], m["dim"]): m["per_channel"] * row["channels"] for m in row["members"]}
            assert counted == owned


def test_the_json_form_is_json() -> None:
    found = _inspect().to_json()
    assert json.loads(json.dumps(found)) == found


def _shown(inspection: Inspection, width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as shown:
        console.print(inspection.table())
    return shown.get()


def _words(text: str) -> str:
    """The text with every line break and indentation one blank."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_group_and_why_some_stay_whole(width: int) -> None:
    text = _shown(_inspect(ignore=("3",)), width)
    assert "stays whole: it reaches the model's output" in text
    assert "stays whole: 3 is on the ignore list" in text
    assert "[small], input 3x5x5: 0.0 M MACs, 0.00 M params" in text
    assert "1 of 3 groups can be cut" in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["test_vit", "resnet18"])
def test_the_table_fits_the_terminal_with_one_line_of_figures_a_group(name: str, width: int) -> None:
    model, images = timm.create_model(name, num_classes=5), torch.zeros(1, 3, 160, 160)
    inspection = inspect_module(name, model, images)
    text = _shown(inspection, width)
    assert max(map(len, text.splitlines())) <= width
    for row in inspection.to_json()["groups"]:
        figures = (
            rf"^ *{row['name']} +{row['channels']} +{row['macs_share']:.3f} +{row['params_share']:.3f} *$"
        )
        assert re.search(figures, text, re.MULTILINE)
        assert row["frozen"] in _words(text)


def test_the_table_says_what_a_unit_is_and_who_belongs_to_a_group() -> None:
    vit = inspect_module("vit", timm.create_model("test_vit", num_classes=5), torch.zeros(1, 3, 160, 160))
    text = _words(_shown(vit, 80))
    assert re.search(r" blocks.0.attn.qkv 2 \S+ \S+ units of 96 rows; read by blocks.0.attn.proj ", text)
    assert "along with cls_token, pos_embed; read by blocks.0-5.attn.qkv, blocks.0-5.mlp.fc1, head" in text


def test_the_table_says_what_has_to_be_zero_for_a_block_to_go() -> None:
    model = timm.create_model("test_vit", num_classes=5, img_size=32)
    text = _words(_shown(inspect_module("vit", model, torch.zeros(1, 3, 32, 32), blocks="all"), 120))
    last = ", ".join(f"blocks.0.{name}" for name in ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight"))
    assert f"the whole block, once {last}, blocks.0.mlp.fc2.bias is zero" in text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a", "a", "b"], "a, b"),
        (["b.0.f", "b.1.f", "b.2.f"], "b.0-2.f"),
        (["b.0.f", "b.2.f", "b.3.f", "b.10.f"], "b.0.f, b.2-3.f, b.10.f"),
        (["s.0.b.0.f", "s.0.b.1.f", "s.1.b.0.f", "s.1.b.1.f"], "s.0-1.b.0-1.f"),
        (["s.0.b.0.f", "s.0.b.1.f", "s.1.b.0.f"], "s.0-1.b.0.f, s.0.b.1.f"),
        (["0", "1", "3"], "0-1, 3"),
        (["layer1", "layer2", ""], "layer1, layer2, "),
    ],
)
def test_names_that_differ_in_a_number_are_shown_as_one(names: list[str], shown: str) -> None:
    assert _compact(names) == shown


def test_two_hundred_groups_are_shown_in_no_time() -> None:
    members = tuple(
        Member(f"blocks.{i}.conv.weight", 0, tuple(range(64)), 1, "producer", True) for i in range(100)
    )
    groups = ChannelGroups(
        tuple(ChannelGroup(f"group{i}", 64, members) for i in range(200)),
        InputSpec.of(torch.zeros(1, 3, 8, 8)),
        tuple(LayerCost(m.tensor, (64, 64), 100) for m in members),
        {**{m.tensor: (64, 64) for m in members}, **{f"other.{i}": (3,) for i in range(2000)}},
        (*(f"other.{i}" for i in range(2000)), *(m.tensor for m in members)),
    )
    begin = time.process_time()
    _shown(Inspection("large", (3, 8, 8), 10**9, 10**6, groups), 80)
    assert time.process_time() - begin < 3


def test_what_no_pass_reads_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model[0].spare = nn.Conv2d(8, 2, 1)
    inspection = inspect_module("spare", model, torch.zeros(1, 3, 9, 9))
    assert inspection.to_json()["unread"] == ["0.spare.weight", "0.spare.bias"]
    assert "No pass of the model read 0.spare.weight, 0.spare.bias" in _words(_shown(inspection, 120))
