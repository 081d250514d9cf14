"""The examples run as a reader would run them: as programs, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_training_loop_prunes_saves_exports_and_measures(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "own_training_loop.py", "--output", tmp_path, "--steps", "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    rows = dict(re.findall(r"^(dense|pruned) +0\.\d{3} +([\d,]+) +\d+\.\d+$", finished.stdout, re.MULTILINE))
    dense, pruned = (int(rows[name].replace(",", "")) for name in ("dense", "pruned"))
    assert pruned < 0.6 * dense
    assert re.search(r"^speed-up \d+\.\d\d in ONNX Runtime", finished.stdout, re.MULTILINE)
    differ = re.search(r"differ by (\S+) of the largest logit", finished.stdout)
    assert differ is not None
    assert float(differ[1]) < 1e-4
    for name in ("dense", "pruned"):
        onnx.checker.check_model(onnx.load(tmp_path / f"{name}.onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.onnx", "pruned", "pruned.onnx"]


def test_the_loop_to_a_speed_cuts_and_says_what_was_asked_and_measured(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "speed_in_your_loop.py", "--output", tmp_path, "--steps", "30"]
    # Not the default of 1.5: on a busy machine so small a model may look as if it could not get that fast.
    command += ["--speedup", "1.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280
    )
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"^found after \d trials: \d+\.\d\d times as fast$", finished.stdout, re.MULTILINE)
    assert "all that was to go is zero" in finished.stdout
    rows = dict(
        re.findall(r"^(dense|pruned): accuracy 0\.\d{3}, ([\d,]+) parameters$", finished.stdout, re.MULTILINE)
    )
    dense, pruned = (int(rows[name].replace(",", "")) for name in ("dense", "pruned"))
    assert pruned < dense
    assert re.search(r"^speed-up asked 1\.20, measured \d+\.\d\d, ", finished.stdout, re.MULTILINE)
    for name in ("dense", "pruned"):
        onnx.checker.check_model(onnx.load(tmp_path / f"{name}.onnx"))


@pytest.mark.parametrize("name", ["lightning_trainer.py", "hugging_face_trainer.py"])
def test_the_trainers_of_others_leave_zeros_that_can_be_cut(tmp_path: Path, name: str) -> None:
    finished = subprocess.run(
        [sys.executable, EXAMPLES / name, "--epochs", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    found = re.search(
        r"parameters ([\d,]+) -> ([\d,]+); masked and cut model differ by (\S+)", finished.stdout
    )
    assert found is not None
    before, after = (int(found[i].replace(",", "")) for i in (1, 2))
    assert after < 0.8 * before
    assert float(found[3]) < 1e-4
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_run_by_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in tests for path in EXAMPLES.glob("*.py"))
