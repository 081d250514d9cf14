"""The zoo benchmark runs as a program: on a model that passes, on a name that timm does not know, and on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member, Rounding
from sparsekit.structure.inputs import InputSpec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import zoo

    return zoo


def _command(folder: Path, names: str) -> list[str]:
    """The benchmark on these names, one a line."""
    models = folder / "models.txt"
    models.write_text(names, encoding="utf-8")
    where = ["--output", folder / "results", "--docs", folder / "docs" / "zoo.md"]
    words = [BENCHMARKS / "zoo.py", "--models", models, *where, "--only", "sparsekit", "--threads", "1"]
    return [str(word) for word in words]


def _records(folder: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((folder / "results" / "zoo.json").read_text(encoding="utf-8"))
    return records


def test_a_run_records_every_stage_goes_on_after_a_bad_name_and_is_resumed(
    tmp_path: Path, zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = subprocess.run(
        [sys.executable, *_command(tmp_path, "# the smallest\n\ntest_resnet  # 160 px\n")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    (record,) = _records(tmp_path)
    assert (record["model"], record["status"], record["error"]) == ("test_resnet", "ok", None)
    stages = "build forward analyse cut prove api train cut_again save load export parity"
    assert list(record["seconds"]) == stages.split()
    assert all(seconds > 0 for seconds in record["seconds"].values())
    assert 0.4 < record["params_removed"] < 0.8
    assert 0.4 < record["macs_removed"] < 0.8
    assert 0 < record["frozen"] < 0.1
    assert record["frozen_reasons"] == {"it reaches the model's output": 1}
    assert record["forward_backward_seconds"] > 0
    assert record["analysis_ratio_ok"] is True
    assert record["max_rel"] < 1e-5
    assert set(record["api"].values()) == {True}
    assert (record["torch_pruning_status"], record["torch_pruning_seconds"]) == (None, None)

    assert "| test_resnet | ok | 0." in (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")

    # From here on in this process, and without one for each model: they take seconds to start.
    zoo.run_stages("sparsekit", "no_such_model", tmp_path, 1)
    failed: dict[str, Any] = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert failed["status"] == "build"
    assert "no_such_model" in failed["error"]
    failed["timed_out"] = False
    ran: list[str] = []

    def run_part(part: str, name: str, threads: int, limit: float) -> dict[str, Any]:
        ran.append(name)
        return failed if part == "sparsekit" else failed | _repaired(tmp_path, zoo)

    monkeypatch.setattr(zoo, "run_part", run_part)
    command = _command(tmp_path, "no_such_model\ntest_resnet\nnor_this\n")
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    zoo.main()
    assert ran == ["no_such_model", "nor_this"]
    resumed = _records(tmp_path)
    assert resumed[0] == record
    assert [(e["model"], e["status"]) for e in resumed[1:]] == [(name, "build") for name in ran]
    page = (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert "- sparsekit: 1 of 3 ok; failed in: build 2" in page
    assert "| no_such_model | build |" in page

    monkeypatch.setattr(sys, "argv", [*_command(tmp_path, "test_resnet\n"), "--only", "repair"])
    zoo.main()
    assert [bool(entry.pop("repair")) for entry in _records(tmp_path)] == [True, False, False]
    assert [entry | {"repair": None} for entry in _records(tmp_path)] == resumed
    page = (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert "- repair: 1 of 1 ok" in page
    assert "lowered the error of the output in 1 of them" in page


def _repaired(folder: Path, zoo: ModuleType) -> dict[str, Any]:
    """The repair part of the smallest ResNet, in this process."""
    zoo.run_stages("repair", "test_resnet", folder, 1)
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert list(record["seconds"]) == ["build", "repair"]
    assert record["repaired_error"] < 0.7 * record["cut_error"]
    assert record["constant_error"] > 0.3  # the images differ, and what the network makes of them
    assert record["repaired_layers"] > 0
    assert record["left_out"] == {}
    return record


@pytest.mark.parametrize(("n", "multiple", "least", "kept"), [(32, 8, 8, 16), (24, 8, 8, 16), (6, 4, 8, 6)])
def test_half_of_a_group_goes_as_far_as_its_rounding_allows(
    n: int, multiple: int, least: int, kept: int, zoo: ModuleType
) -> None:
    group = ChannelGroup("a", n, (), rounding=Rounding(multiple, least))
    assert zoo.n_kept(group, rounded=True) == kept
    assert zoo.n_kept(group, rounded=False) == n // 2


def test_a_model_over_its_time_limit_fails_in_the_stage_it_was_in(zoo: ModuleType) -> None:
    record = zoo.run_part("sparsekit", "test_resnet", threads=1, limit=0.5)
    assert (record["status"], record["error"]) == ("build", "no result within 0.5 s")


def test_the_smallest_of_each_sub_family_is_chosen_then_the_smallest(zoo: ModuleType) -> None:
    sizes = {"resnet50": 25, "test_resnet": 1, "resnext50": 26, "resnet18": 11, "seresnet18": 12, "big": 70}
    n_params = {name: n * 10**6 for name, n in sizes.items()}
    assert zoo.pick(n_params) == ["test_resnet", "seresnet18", "resnext50", "resnet18"]
    assert zoo.pick(n_params, count=1) == ["test_resnet"]
    assert zoo.pick({"big": 70 * 10**6}) == []


def test_the_shipped_list_names_each_model_once(zoo: ModuleType) -> None:
    import timm

    names = zoo.read_names(BENCHMARKS / "zoo.txt")
    assert len(names) == len(set(names)) == 88
    assert all(timm.is_model(name) for name in names)


def test_the_frozen_share_counts_parameters_no_free_group_touches(zoo: ModuleType) -> None:
    def member(tensor: str) -> Member:
        return Member(tensor, 0, (0, 1), 1, "producer")

    groups = ChannelGroups(
        groups=(
            ChannelGroup("a", 2, (member("a.weight"), member("b.weight"))),
            ChannelGroup("b", 2, (member("b.weight"), member("c.weight")), "blocks.3 reshapes"),
            ChannelGroup("d", 2, (member("d.weight"),), "blocks.12 reshapes"),
        ),
        inputs=InputSpec(),
        tensor_shapes={"a.weight": (2, 5), "b.weight": (2, 10), "c.weight": (2, 20), "d.weight": (2, 5), "e": (20,)},
        parameters=("a.weight", "b.weight", "c.weight", "d.weight", "e"),
    )  # fmt: skip
    assert zoo.frozen_share(groups) == {
        "frozen": 0.7,
        "frozen_reasons": {"blocks.N reshapes": 2},
        "frozen_main_reason": "blocks.N reshapes",
    }
