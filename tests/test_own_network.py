"""Recipes of a person's own network, as the documentation shows it, from the folder that has its module."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, WIDE_STEPS, documented_network, in_this_process, options, sparsekit

import sparsekit as sk
from sparsekit.errors import FileError
from sparsekit.recipe.reading import load_recipe
from sparsekit.report.schema import read_report
from sparsekit.runs.rehearsal import check_inputs

CODE = documented_network()
OWN = TINY.replace("model: {name: test_resnet}", "model:\n  factory: nets:build\n  args: {width: 32}")
# The module of the folder, whose marker file tells that it was imported.
MARKED = f"from pathlib import Path\n\nPath('imported').touch()\n{CODE}"


def write_folder(folder: Path, code: str = MARKED) -> None:
    """A folder with a recipe and the module that it names."""
    (folder / "nets.py").write_text(code)
    (folder / "recipe.yaml").write_text(OWN)


@pytest.fixture(scope="module")
def finished(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The folder of a finished run of one's own network; tests that change it do so in a copy."""

    def make(folder: Path) -> None:
        write_folder(folder)
        done = sparsekit(
            *("prune", "recipe.yaml", "--output", "run"), *options("training.ema=0.9"), cwd=folder
        )
        assert done.returncode == 0, done.stderr
        assert "nets:build" in done.stdout

    return made_once("own-network", make)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what is imported from there is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture
def copied(finished: Path, folder: Path) -> Path:
    """A copy of the finished run and of its module, in the current folder; the module was not imported from there."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    (folder / "imported").unlink()
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    sys.modules.pop("nets", None)


def as_if_killed(run: Path, *left: str) -> None:
    """Take the stages after these out of the journal."""
    journal = run / "checkpoints" / "journal.json"
    content = json.loads(journal.read_text())
    content["stages"] = [stage for stage in content["stages"] if stage["name"] in left]
    journal.write_text(json.dumps(content))


def test_a_run_names_the_function_and_its_arguments_everywhere(finished: Path) -> None:
    run = finished / "run"
    report = read_report(run / "report.json")
    assert report.macs_ratio >= 2.0
    assert report.sparse.max_abs_logit_change <= 1e-4
    assert report.epochs.baseline == 5
    assert (report.model.name, report.model.own) == ("nets:build", True)
    assert report.model.args == {"num_classes": 10, "width": 32}
    assert load_recipe(run / "recipe.yaml").model.factory == "nets:build"
    journal = json.loads((run / "checkpoints" / "journal.json").read_text())
    assert [sorted(hashes) for hashes in journal["code"]] == [["nets"]]
    page = (run / "report.html").read_text()
    assert "from nets import build" in page
    assert "factory=lambda: build(num_classes=10, width=32)" in page


def test_an_artifact_runs_no_code_by_its_own_word(copied: Path) -> None:
    with pytest.raises(FileError, match=r"not a timm model; pass load\(\.\.\., factory=\.\.\.\)"):
        sk.load("run/pruned")
    for command in (["export", "run"], ["export", "run/pruned"]):
        refused = in_this_process(*command)
        assert refused.returncode == 2
        assert "name the function that builds it with --factory" in refused.stderr
    planned = in_this_process("plan", "run")
    assert planned.returncode == 2
    assert "add --set model.factory=nets:build (run/recipe.yaml, line" in planned.stderr
    assert in_this_process("report", "run").returncode == 0
    assert in_this_process("bench", "run/dense.onnx", "run/pruned.onnx", "--rounds", 10).returncode == 0
    assert not (copied / "imported").exists()


def test_what_a_person_names_is_run(copied: Path) -> None:
    exported = in_this_process("export", "run", "--factory", "nets:build")
    assert exported.returncode == 0, exported.stderr
    planned = in_this_process("plan", "run", *options("model.factory=nets:build", *WIDE_STEPS), "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["model"] == "nets:build"
    wrong = in_this_process("export", "run", "--factory", "nets:bild", "--batch-size", 2)
    assert wrong.returncode == 2
    assert "nets.py has no function bild; did you mean build?" in wrong.stderr
    from nets import build  # type: ignore[import-not-found]

    pruned = sk.load("run/pruned", factory=lambda: build(num_classes=10, width=32))
    assert pruned(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_inspect_and_validate_take_a_recipe_of_one_s_own_network(copied: Path) -> None:
    shown = in_this_process("inspect", "recipe.yaml", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["model"] == "nets:build"
    valid = in_this_process("validate", "recipe.yaml")
    assert valid.returncode == 0, valid.stderr
    assert "nets:build, as the function gives it" in valid.stdout


def test_code_that_changed_is_told_and_a_model_that_changed_is_refused(copied: Path) -> None:
    resume = ("prune", "recipe.yaml", "--output", "run", "--resume", *options("training.ema=0.9"))
    as_if_killed(copied / "run", "dense", "baseline", "sparsify", "cut", "finetune", "export")
    edit(copied / "nets.py", "nn.ReLU()", "nn.Tanh()")
    log = (copied / "run" / "run.log").read_text()
    refused = in_this_process(*resume)
    assert refused.returncode == 2
    assert (
        "the code of nets has changed since the run in run began, and it is another model" in refused.stderr
    )
    assert "(recipe.yaml, line 3)" in refused.stderr
    assert (copied / "run" / "run.log").read_text() == log
    edit(copied / "nets.py", "nn.Tanh()", "nn.ReLU(inplace=False)")
    resumed = in_this_process(*resume)
    assert resumed.returncode == 0, resumed.stderr
    assert "warning: the code of nets has changed since the run began" in resumed.stderr
    warnings = read_report(copied / "run" / "report.json").warnings
    assert any(warning.startswith("The code of nets was changed during the run") for warning in warnings)


WRONG = [
    ("nest:build", CODE, "model.factory nest:build: there is no module nest in "),
    ("nets:bild", CODE, "model.factory nets:bild: nets.py has no function bild; did you mean build?"),
    ("nets:build", "1 / 0", "model.factory nets:build: nets cannot be imported: ZeroDivisionError: "),
    ("nets:build", "def build(width): return {}", "it must return a torch.nn.Module, got dict"),
    ("nets:build", "def build(width): raise ValueError('no')", "it failed: ValueError: no (nets.py, line 1)"),
    ("nets:build", "def build(num_classes): ...", "model.args: build has no parameter width; it has "),
    ("nets:build", "def build(width, depth): ...", "model.args: build needs depth, and nothing says it; "),
    (
        "nets:build",
        CODE.replace("num_classes: int", "num_classes: int = 5").replace(
            "nn.Linear(width, num_classes)", "nn.Linear(width, 7)"
        ),
        "the model must give one number for each of 10 classes, got [2, 7] for 2 images; ",
    ),
    (
        "nets:build",
        CODE.replace("nn.Flatten(),", ""),
        "model.factory nets:build: it does not run in training on 2 images of 3x32x32 (RuntimeError: ",
    ),
]


@pytest.mark.parametrize(("factory", "code", "message"), WRONG)
def test_each_mistake_of_a_network_is_one_line_that_says_where(
    factory: str, code: str, message: str, folder: Path
) -> None:
    write_folder(folder, code)
    refused = in_this_process("validate", "recipe.yaml", "--set", f"model.factory={factory}")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert message in line
    place = r"recipe\.yaml, line 4" if "model.args" in line else rf"--set model\.factory={factory}"
    assert re.search(rf"\({place}\)$", line)


def finished_recipe(folder: Path, code: str, *overrides: str) -> list[str]:
    """Write a recipe of a finished network, and list its problems."""
    write_folder(folder, code)
    sys.modules.pop("nets", None)
    return check_inputs(load_recipe(folder / "recipe.yaml", ("dense.epochs=0", *overrides)))


RETURNED = "    return network\n"
LOADED = """\
    network.load_state_dict(torch.load("mine.pt", weights_only=True))
    return network
"""


def test_a_finished_network_may_load_its_weights_in_the_function(folder: Path) -> None:
    drawn = CODE.replace("return nn.Seq", "network = nn.Seq") + RETURNED
    (problem,) = finished_recipe(folder, drawn)
    assert problem.startswith(
        "dense.epochs 0 needs trained weights, and nets:build draws new ones at every call"
    )
    sys.path.insert(0, os.getcwd())
    import nets

    torch.save(nets.build(10).state_dict(), "mine.pt")
    loading = f"import torch\n{drawn.replace(RETURNED, LOADED)}"
    assert finished_recipe(folder, loading) == []
    # Without labels the function says how many classes the network knows.
    unlabelled = finished_recipe(folder, loading, "data.labels=false", "dense.baseline=false")
    assert unlabelled == ["model.args: build needs num_classes, and nothing says it; set it here"]
    default = loading.replace("num_classes: int", "num_classes: int = 10")
    assert finished_recipe(folder, default, "data.labels=false", "dense.baseline=false") == []
