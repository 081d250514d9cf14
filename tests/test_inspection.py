"""What inspect shows agrees with the model, counted by hand."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import nn

from sparsekit.inspection import Inspection, inspect_module


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


def test_the_json_form_is_json() -> None:
    found = _inspect().to_json()
    assert json.loads(json.dumps(found)) == found


def test_the_table_shows_every_group_and_why_some_stay_whole() -> None:
    console = Console(width=140, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as shown:
        console.print(_inspect(ignore=("3",)).table())
    text = shown.get()
    assert "it reaches the model's output" in text
    assert "3 is on the ignore list" in text
    assert "[small], input 3x5x5: 0.0 M MACs, 0.00 M parameters" in text
    assert "1 of 3 groups can be cut" in text
