"""Stages depend on the keys they name, note their seconds, and are skipped once they are done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator
from rich.console import Console

from sparsekit.errors import FileError, InputError
from sparsekit.recipe.reading import load_recipe
from sparsekit.runs.rehearsal import Inputs
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.runs.stages import Stage, run_stage

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def _run(folder: Path, *overrides: str, resume: bool = False) -> Run:
    files = RunDirectory(folder / "run")
    files.open(resume=resume)
    inputs = cast("Inputs", SimpleNamespace(fingerprint="images"))
    return Run(load_recipe(QUICKSTART, overrides), inputs, files, Accelerator(cpu=True), Console(quiet=True))


def _found(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    tick()
    return {"found": 1}


def test_a_stage_depends_on_the_sections_and_single_keys_that_it_names(tmp_path: Path) -> None:
    run = _run(tmp_path)
    settings = Stage("x", _found, ("training", "sparsify.epochs", "sparsify.lr")).settings(run)
    assert settings.keys() == {"images", "seed", "precision", "training", "sparsify"}
    assert settings["sparsify"] == {"epochs": run.recipe.sparsify.epochs, "lr": run.recipe.sparsify.lr}
    # More attempts may be made than a run was begun with.
    assert "attempts" not in Stage("x", _found, ("cut",)).settings(run)["cut"]


def test_a_done_stage_is_skipped_and_only_what_it_depends_on_is_locked(tmp_path: Path) -> None:
    stage = Stage("x", _found, ("sparsify.epochs",), ("left.txt",))
    run = _run(tmp_path)
    (run.files.path / "left.txt").touch()
    run_stage(run, stage)
    again = _run(tmp_path, "sparsify.debias=0.3", resume=True)
    run_stage(again, Stage("x", lambda run, tick: pytest.fail("made again"), stage.sections, stage.leaves))
    assert again.files.result("x", dict) == {"found": 1}
    with pytest.raises(FileError, match=r"sparsify\.epochs"):
        run_stage(_run(tmp_path, "sparsify.epochs=99", resume=True), stage)
    learning = Stage("y", _found, ("sparsify",))
    run_stage(run, learning)
    with pytest.raises(FileError, match=r"sparsify\.distill"):
        run_stage(_run(tmp_path, "sparsify.distill={weight: 1}", resume=True), learning)
    (run.files.path / "left.txt").unlink()
    with pytest.raises(FileError, match=r"left\.txt is gone"):
        run_stage(_run(tmp_path, resume=True), stage)


def test_a_stage_within_a_stage_lets_the_outer_one_count_too(tmp_path: Path) -> None:
    ticks: list[str] = []
    run_stage(_run(tmp_path), Stage("inner", _found, ()), also=lambda: ticks.append("outer"))
    assert ticks


def test_a_stage_that_fails_is_logged_and_begins_again(tmp_path: Path) -> None:
    def fail(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
        raise InputError("no such speed")

    with pytest.raises(InputError):
        run_stage(_run(tmp_path), Stage("x", fail, ("sparsify",)))
    assert "x: stopped by InputError: no such speed" in (tmp_path / "run/run.log").read_text()
    again = _run(tmp_path, "sparsify.epochs=99", resume=True)
    run_stage(again, Stage("x", _found, ("sparsify",)))
    assert again.files.is_done("x")
