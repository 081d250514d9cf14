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

from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member

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
        [sys.executable, *_command(tmp_path, "no_such_model\n\n# the smallest\ntest_resnet  # 160 px\n")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    unknown, record = _records(tmp_path)
    assert (unknown["model"], unknown["status"]) == ("no_such_model", "build")
    assert "no_such_model" in unknown["error"]

    assert (record["model"], record["status"], record["error"]) == ("test_resnet", "ok", None)
    stages = "build forward analyse cut prove repair api train cut_again save load export parity"
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

    page = (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert "- sparsekit: 1 of 2 ok; failed in: build 1" in page
    assert "| test_resnet | ok | 0." in page
    assert "| no_such_model | build |" in page

    command = _command(tmp_path, "test_resnet\nno_such_model\nnor_this\n")
    monkeypatch.setattr(
        sys, "argv", [*command, "--resume"]
    )  # in this process: another takes seconds to start
    zoo.main()
    resumed = _records(tmp_path)
    assert resumed[:2] == [unknown, record]
    assert [(entry["model"], entry["status"]) for entry in resumed[2:]] == [("nor_this", "build")]


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
        input_shapes=((1, 3, 8, 8),),
        tensor_shapes={"a.weight": (2, 5), "b.weight": (2, 10), "c.weight": (2, 20), "d.weight": (2, 5), "e": (20,)},
        parameters=("a.weight", "b.weight", "c.weight", "d.weight", "e"),
    )  # fmt: skip
    assert zoo.frozen_share(groups) == {
        "frozen": 0.7,
        "frozen_reasons": {"blocks.N reshapes": 2},
        "frozen_main_reason": "blocks.N reshapes",
    }
