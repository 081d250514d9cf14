"""Whole runs, as a person starts them, on the embedded digits: each command as a process at least once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from tiny_run import TINY, WIDE_STEPS, in_this_process, options, sparsekit

import sparsekit as sk
from sparsekit.report.schema import read_report
from sparsekit.surgery.bypass import bypassed
from sparsekit.training.data_sources import open_digits
from sparsekit.training.models import create_model, save_weights


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sparsekit", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        # A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until the file exists: the run has come that far."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} never appeared"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A finished run that nothing interrupted; tests that change it do so in a copy."""

    def make(folder: Path) -> None:
        done = sparsekit("prune", recipe, "--output", folder / "run")
        assert done.returncode == 0, done.stderr
        assert "speed-up" in done.stdout

    return made_once("whole", make) / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(run, tmp_path / run.name))


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "pruned" / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_leaves_every_file_it_promises_and_no_pickle(run: Path) -> None:
    for name in (
        *(
            "recipe.yaml",
            "report.json",
            "report.html",
            "dense.onnx",
            "pruned.onnx",
            "metrics.jsonl",
            "run.log",
        ),
        *("pruned/model.safetensors", "pruned/structure.json", "checkpoints/journal.json"),
    ):
        assert (run / name).stat().st_size > 0, name
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes == {".yaml", ".json", ".jsonl", ".html", ".onnx", ".safetensors", ".log"}
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("*.state.safetensors"))


def test_the_report_agrees_with_the_files_it_describes(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    pruned = sk.load(run / "pruned")
    assert report["pruned"]["params"] == sum(p.numel() for p in pruned.parameters())
    assert report["pruned"]["onnx_bytes"] == (run / "pruned.onnx").stat().st_size
    assert report["macs_ratio"] == pytest.approx(report["dense"]["macs"] / report["pruned"]["macs"])
    assert report["macs_ratio"] >= 2.0
    assert report["speed_efficiency"] == pytest.approx(report["speedup"]["value"] / report["macs_ratio"])
    names = [stage["name"] for stage in report["stages"]]
    assert names == ["dense", "baseline", "sparsify", "cut", "finetune", "export", "benchmark"]
    assert {stage["status"] for stage in report["stages"]} == {"done"}
    for key in ("parity", "machine", "seed", "versions", "sparse", "speedup"):
        assert key in report


def test_the_cut_loses_nothing_because_the_zeros_are_exact(run: Path) -> None:
    sparse = json.loads((run / "report.json").read_text())["sparse"]
    assert sparse["max_abs_logit_change"] <= 1e-4
    assert sparse["accuracy_after_cut"] == sparse["accuracy_before_cut"]
    assert sparse["near_zero_channels"] > 0


def test_the_onnx_file_says_what_it_needs_and_gives_the_artifact_s_logits(run: Path) -> None:
    model = onnx.load(run / "pruned.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["input_size"]) == [3, 32, 32]
    assert "test_resnet" in metadata["recipe"]
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(run / "pruned.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = sk.load(run / "pruned")(images)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4 * float(expected.abs().max()))


def test_metrics_have_one_line_an_epoch_and_phase(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [(row["phase"], row["epoch"]) for row in rows]
    expected = {"dense": 1, "sparsify": 3, "finetune": 2, "baseline": 5}
    assert sorted(epochs) == sorted((phase, e) for phase, n in expected.items() for e in range(1, n + 1))


def test_a_finished_run_is_not_overwritten_and_can_be_resumed_at_no_cost(copied: Path, recipe: Path) -> None:
    before = weights_hash(copied)
    refused = in_this_process("prune", recipe, "--output", copied)
    assert refused.returncode == 2
    assert "already holds a run" in refused.stderr
    again = in_this_process("prune", recipe, "--output", copied, "--resume")
    assert again.returncode == 0, again.stderr
    assert "dense: done before" in again.stderr
    assert weights_hash(copied) == before


def test_a_done_stage_whose_files_are_gone_is_not_believed(copied: Path, recipe: Path) -> None:
    (copied / "pruned.onnx").unlink()
    refused = in_this_process("prune", recipe, "--output", copied, "--resume")
    assert refused.returncode == 2
    assert "pruned.onnx" in refused.stderr


def test_resuming_with_another_recipe_is_refused_and_names_the_key(run: Path, recipe: Path) -> None:
    refused = in_this_process("prune", recipe, "--output", run, "--resume", "--set", "training.lr=0.01")
    assert refused.returncode == 2
    assert "training.lr" in refused.stderr
    assert "lr: 0.05" in (run / "recipe.yaml").read_text()


def test_a_run_stopped_in_every_phase_resumes_to_the_same_weights_and_ctrl_c_says_how(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    """The same run is killed three times, each time further on, and stopped by Ctrl-C in its last training."""
    output, resume = tmp_path / "killed", False
    for phase in ("dense", "baseline-finetune", "sparsify", "finetune"):
        process = start("prune", recipe, "--output", output, *["--resume"] * resume)
        wait_for(output / "checkpoints" / f"{phase}.state.safetensors", process)
        process.send_signal(signal.SIGINT if phase == "finetune" else signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        resume = True
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    resumed = in_this_process("prune", recipe, "--output", output, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert weights_hash(output) == weights_hash(run)
    ours, theirs = read_report(output / "report.json"), read_report(run / "report.json")
    assert ours.dense.accuracy == theirs.dense.accuracy
    assert ours.sparse == theirs.sparse
    without_time = [point.model_copy(update={"seconds": 0.0}) for point in ours.curves]
    assert without_time == [point.model_copy(update={"seconds": 0.0}) for point in theirs.curves]


def test_a_loss_that_is_not_finite_ends_the_run_with_one_message(recipe: Path, tmp_path: Path) -> None:
    failed = in_this_process("prune", recipe, "--output", tmp_path / "run", "--set", "training.lr=1e12")
    assert failed.returncode == 1
    assert "not finite" in failed.stderr or "NaN" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_finished_checkpoint_is_only_evaluated_and_compared_without_a_baseline(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    checkpoint = run / "checkpoints" / "baseline.safetensors"
    done = in_this_process(
        *("prune", recipe, "--output", tmp_path / "run", "--set", f"model.checkpoint={checkpoint}"),
        *("--set", "dense.epochs=0", "--set", "training.optimizer=adamw", "--set", "training.lr=0.003"),
        *("--set", "export.dynamic_batch=true", "--set", "training.ema=0.9", "--set", "cut.recalibrate=200"),
    )
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run" / "report.json")
    assert report.dense.accuracy == read_report(run / "report.json").dense.accuracy
    assert (report.epochs.dense, report.epochs.baseline) == (0, 0)
    assert report.sparse.max_abs_logit_change <= 1e-4
    assert (tmp_path / "run" / "pruned.dynamic.onnx").exists()


def _photos(folder: Path, count: int) -> Path:
    """Write digits as images without labels: some lie in the folder itself, some in one inside another."""
    images, _ = open_digits()
    (folder / "holiday" / "monday").mkdir(parents=True)
    for i in range(count):
        picture, _ = images[i]
        picture.save((folder if i % 2 else folder / "holiday" / "monday") / f"{i}.png")
    return folder


def test_a_finished_checkpoint_is_repaired_with_images_that_have_no_labels(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    checkpoint = run / "checkpoints" / "baseline.safetensors"
    photos = _photos(tmp_path / "photos", 360)
    done = in_this_process(
        *("prune", recipe, "--output", tmp_path / "run", "--set", f"model.checkpoint={checkpoint}"),
        *options("data.name=folder", f"data.root={photos}", "data.train=''", "data.labels=false"),
        *options("dense.epochs=0", "sparsify.epochs=0", "finetune.epochs=0", "finetune.distill=null"),
        *options("cut.target={macs: 0.6}", "cut.repair={images: 128, distill_seconds: 1}", "cut.blocks=true"),
    )
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run" / "report.json")
    assert report.macs_ratio >= 1 / 0.6
    assert "closed form" in (tmp_path / "run" / "run.log").read_text()
    # Accuracy is agreement with the dense model. One-shot cuts of this size lose most of it.
    assert not report.data.labels
    assert len(report.data.class_names) == 10
    assert report.dense.accuracy == report.sparse.accuracy_before_cut == report.dense.accuracy_onnx == 1.0
    assert 0.8 <= report.sparse.accuracy_after_cut == report.pruned.accuracy
    assert "agreement with dense" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "classified correctly" not in page
    assert "Test agreement" in page
    info = json.loads((tmp_path / "run" / "pruned" / "structure.json").read_text())["info"]
    assert info["test_agreement"] == report.pruned.accuracy
    assert not any("the same answer" in warning for warning in report.warnings)
    journal = tmp_path / "run" / "checkpoints" / "journal.json"
    stages = json.loads(journal.read_text())["stages"]
    assert 0.05 < stages[0]["result"]["commonest_answer"] < 0.3
    stages[0]["result"]["commonest_answer"] = 0.97
    journal.write_text(json.dumps({"stages": stages}))
    again = in_this_process("report", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    warned = read_report(tmp_path / "run" / "report.json").warnings
    assert any(
        warning.startswith("The dense model gives 97% of the test images the same") for warning in warned
    )
    planned = in_this_process("plan", tmp_path / "run", "--json")
    assert planned.returncode == 0, planned.stderr
    found = json.loads(planned.stdout)
    assert found["left"]["macs"] <= 0.6
    assert [speed["asked"] for speed in found["speeds"]] == sorted(
        speed["asked"] for speed in found["speeds"]
    )
    assert all(speed["kl"] > 0 and 0 < speed["kept"]["macs"] < 1 for speed in found["speeds"])


def test_a_checkpoint_with_another_number_of_classes_is_refused(recipe: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "seven.safetensors"
    save_weights(create_model("test_resnet", num_classes=7), checkpoint)
    refused = in_this_process(
        "prune", recipe, "--output", tmp_path / "run", "--set", f"model.checkpoint={checkpoint}"
    )
    assert refused.returncode == 2
    assert "7 classes" in refused.stderr
    assert "10" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_bench_export_and_report_work_on_a_run(copied: Path, tmp_path: Path) -> None:
    timed = in_this_process("bench", copied / "dense.onnx", copied / "pruned.onnx", "--rounds", 20, "--json")
    assert timed.returncode == 0, timed.stderr
    assert len(json.loads(timed.stdout)["speedups"]) == 1
    exported = sparsekit("export", copied, "--output", tmp_path / "again.onnx", "--dynamic-batch")
    assert exported.returncode == 0, exported.stderr
    session = onnxruntime.InferenceSession(tmp_path / "again.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 3, 32, 32), np.float32)})
    assert logits.shape == (3, 10)
    beside = in_this_process("export", copied, "--batch-size", 8)
    assert beside.returncode == 0, beside.stderr
    assert (copied / "pruned.b8.onnx").exists()
    assert in_this_process("export", copied, "--batch-size", 8).returncode == 2
    before = (copied / "report.json").read_text()
    (copied / "report.html").unlink()
    reported = sparsekit("report", copied)
    assert reported.returncode == 0, reported.stderr
    assert (copied / "report.html").exists()
    assert (copied / "report.json").read_text() == before


# One after the other in the same two processes, which take long to start; each notes its exit codes.
IN_TURN = """
import json, os, runpy, sys
from pathlib import Path
from sparsekit.latency import search

search._MAX_TRIALS = 2  # how near a speed comes is not looked at
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["sparsekit", *arguments]
    try:
        runpy.run_module("sparsekit", run_name="__main__")
    except SystemExit as ended:
        codes.append(int(ended.code or 0))
Path(f"codes.{os.environ['RANK']}.json").write_text(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def two_processes(recipe: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """What two processes leave: of a speed that cannot be, of the tiny recipe, and of two attempts."""
    searched = [
        *("cut.target={max_accuracy_drop: 0.0001}", "cut.attempts=2", "dense.epochs=8"),
        # So high a rate that the first attempt loses what the dense model has learned.
        *("dense.baseline=false", "sparsify.epochs=1", "sparsify.lr=0.4", "finetune.epochs=0", *WIDE_STEPS),
    ]
    changes = {"no": ["cut.target={speedup: 900}"], "run": [], "searched": searched}
    commands = [
        ["prune", str(recipe), "--output", name, *options("device=cpu", *overrides)]
        for name, overrides in changes.items()
    ]

    def make(folder: Path) -> None:
        (folder / "in_turn.py").write_text(IN_TURN)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
                *("in_turn.py", json.dumps(commands)),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)

    return made_once("two", make)


def test_two_processes_stop_together_at_a_speed_that_cannot_be_and_finish_together(
    two_processes: Path,
) -> None:
    for rank in range(2):
        assert json.loads((two_processes / f"codes.{rank}.json").read_text()) == [2, 0, 0]
    assert "cut.target asks for a speed-up of 900" in (two_processes / "stderr").read_text()
    assert not (two_processes / "no" / "report.json").exists()


def test_two_processes_meet_the_same_target_as_one_and_print_one_report(
    two_processes: Path, run: Path
) -> None:
    assert (two_processes / "stdout").read_text().count("speed efficiency") == 2  # of two runs
    report, alone = read_report(two_processes / "run" / "report.json"), read_report(run / "report.json")
    assert report.asked == alone.asked
    assert report.dense.macs == alone.dense.macs
    assert min(report.macs_ratio, alone.macs_ratio) >= 2.0
    assert report.sparse.max_abs_logit_change <= 1e-4


def test_two_processes_make_the_same_attempts_from_what_the_first_has_measured(two_processes: Path) -> None:
    report = read_report(two_processes / "searched" / "report.json")
    assert [attempt.number for attempt in report.attempts] == [1, 2]
    assert sum(attempt.taken for attempt in report.attempts) == 1
    assert report.sparse.max_abs_logit_change <= 1e-4


@pytest.fixture(scope="module")
def fast_run(recipe: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A finished run that was asked for a speed; how near it came is the machine's affair."""
    target = "cut.target={speedup: 1.2, params: 0.9}"
    changes = options(target, "dense.baseline=false", "export.precisions=[int8, fp16]", *WIDE_STEPS)

    def make(folder: Path) -> None:
        with mock.patch("sparsekit.latency.search._MAX_TRIALS", 2):
            done = in_this_process("prune", recipe, "--output", folder / "run", *changes)
        assert done.returncode == 0, done.stderr
        assert re.search(r"the dense model takes [\d.e-]+ ms; the largest speed-up is predicted", done.stderr)
        assert "choice: predicted a speed-up of" in done.stderr

    return made_once("fast", make) / "run"


def test_a_run_to_a_speed_measures_what_it_chooses_and_cuts_exactly_that(fast_run: Path) -> None:
    journal = json.loads((fast_run / "checkpoints" / "journal.json").read_text())
    stages = {stage["name"]: stage for stage in journal["stages"]}
    choice = stages["cut"]["result"]["cut"]["choice"]
    assert choice == stages["sparsify"]["result"]["choice"]
    assert choice["asked"] == 1.2
    assert 1 <= len(choice["trials"]) <= 2
    assert choice["found"] in choice["trials"]
    assert stages["cut"]["result"]["cut"]["removed_live"] == 0
    assert stages["cut"]["result"]["effect"]["max_abs_logit_change"] < 1e-4
    report = read_report(fast_run / "report.json")
    assert report.params_ratio >= 1 / 0.9
    assert report.asked == {"speedup": 1.2, "params": 0.9}
    told = [w for w in report.warnings if "not met as asked" in w or "the benchmark measured" in w]
    missed = abs(report.speedup.value / 1.2 - 1) > 0.03
    assert bool(told) == (bool(choice["remark"]) or missed)


def test_files_in_fewer_bits_are_tested_and_timed_beside_the_others(fast_run: Path) -> None:
    report = read_report(fast_run / "report.json")
    assert [variant.precision for variant in report.variants] == ["int8", "fp16"]
    for variant in report.variants:
        file = fast_run / f"pruned.{variant.precision}.onnx"
        assert file.stat().st_size == variant.onnx_bytes < report.pruned.onnx_bytes
        assert abs(variant.accuracy_onnx - report.pruned.accuracy_onnx) < 0.1
        assert sk.compare_latency([file], rounds=10).latencies[0].batch == 1
        assert f"pruned, {variant.precision}" in (fast_run / "report.html").read_text()


def test_plan_shows_what_a_target_keeps_predicted_and_measured(
    recipe: Path, fast_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_recipe = sparsekit("plan", recipe, "--json")
    assert of_recipe.returncode == 0, of_recipe.stderr
    found = json.loads(of_recipe.stdout)
    assert found["target"] == {"macs": 0.5}
    assert found["left"]["macs"] <= 0.5
    assert found["left"]["latency"] == pytest.approx(1 / found["found"]["predicted"])
    assert all(0 < group["kept"] <= group["channels"] for group in found["groups"])
    assert all(group["kept"] % 4 == 0 for group in found["groups"] if not group["frozen"])
    assert "weights are random" in found["remark"]
    monkeypatch.setattr("sparsekit.latency.search._MAX_TRIALS", 2)  # how near it comes is not looked at
    of_run = in_this_process("plan", fast_run)
    assert of_run.returncode == 0, of_run.stderr
    assert "target speedup 1.2, params 0.9" in of_run.stdout
    assert "measured:" in of_run.stdout
    assert "weights are random" not in of_run.stdout
    nothing = in_this_process("plan", recipe, "--set", "cut.target=null", "--set", "sparsify.strength=0.1")
    assert nothing.returncode == 2
    assert "no cut.target to plan for" in nothing.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{latency_ms: 5000}", r"cut.target.latency_ms 5000 is met already: the dense model takes [\d.]+ ms"),
        ("{speedup: 900}", "cut.target asks for a speed-up of 900, and with the fewest channels allowed"),
    ],
)
def test_a_speed_that_is_met_or_out_of_reach_is_told_before_anything_is_trained(
    target: str, message: str, recipe: Path, tmp_path: Path
) -> None:
    done = in_this_process("prune", recipe, "--output", tmp_path / "run", "--set", f"cut.target={target}")
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert not (tmp_path / "run" / "checkpoints" / "dense.safetensors").exists()


def test_one_shot_cuts_to_several_shares_at_once_by_another_importance(recipe: Path, tmp_path: Path) -> None:
    changes = options(
        *("cut.target={macs: 0.6, params: 0.5}", "cut.method=budget", "sparsify.epochs=0"),
        *("cut.importance=taylor", "cut.importance_images=64", "dense.baseline=false"),
    )
    done = in_this_process("prune", recipe, "--output", tmp_path / "run", *changes)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run" / "report.json")
    assert report.params_ratio >= 2
    assert report.macs_ratio >= 1 / 0.6 * 0.99


def test_inspect_shows_groups_and_reasons() -> None:
    shown = in_this_process("inspect", "test_resnet", "--image-size", 64, "--json")
    assert shown.returncode == 0, shown.stderr
    groups = json.loads(shown.stdout)["groups"]
    assert any("output" in group["frozen"] for group in groups)
    assert any(group["frozen"] == "" and group["macs_share"] > 0 for group in groups)


def folder_recipe(tmp_path: Path, classes: tuple[str, ...], images: int) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = generator.integers(0, 100, (40, 40, 3), dtype=np.uint8) + np.uint8(100 * number)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    path = tmp_path / "folder.yaml"
    path.write_text(
        TINY.replace(
            "name: digits", f"name: folder\n  root: {tmp_path / 'images'}\n  train: train\n  test: test"
        )
        .replace("batch_size: 32", "batch_size: 8")
        .replace(
            "  train_limit: 256\n  validation_limit: 64\n  test_limit: 96\n", "  validation_share: 0.2\n"
        )
    )
    return path


def test_a_folder_of_a_person_s_own_images_runs_and_does_not_go_on_with_others(tmp_path: Path) -> None:
    recipe = folder_recipe(tmp_path, ("dark", "light"), 20)
    done = in_this_process("prune", recipe, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "run" / "report.json").data.class_names == ("dark", "light")
    given_away = ("report.json", "report.html", "dense.onnx", "pruned.onnx", "pruned/structure.json")
    for name in given_away:  # where the images lie says who the person is
        assert str(tmp_path).encode() not in (tmp_path / "run" / name).read_bytes(), name
    # As if it had been killed before its fine-tuning.
    journal = tmp_path / "run" / "checkpoints" / "journal.json"
    stages = json.loads(journal.read_text())["stages"]
    begun = [stage for stage in stages if stage["name"] in ("dense", "baseline", "sparsify", "cut")]
    journal.write_text(json.dumps({"stages": begun}))
    added = tmp_path / "images" / "train" / "dark" / "new.png"
    added.write_bytes((added.parent / "0.png").read_bytes())
    refused = in_this_process("prune", recipe, "--output", tmp_path / "run", "--resume")
    assert refused.returncode == 2
    assert "images" in refused.stderr


@pytest.mark.parametrize(
    ("classes", "images", "message"), [(("only",), 4, "class"), (("one", "two"), 0, "image")]
)
def test_a_folder_that_cannot_be_learned_from_is_refused(
    classes: tuple[str, ...], images: int, message: str, tmp_path: Path
) -> None:
    refused = in_this_process("prune", folder_recipe(tmp_path, classes, images), "--output", tmp_path / "run")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert str(tmp_path / "images") in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_corrupt_image_ends_the_run_and_is_named(tmp_path: Path) -> None:
    recipe = folder_recipe(tmp_path, ("dark", "light"), 8)
    (tmp_path / "images" / "train" / "dark" / "3.png").write_bytes(b"no image")
    failed = in_this_process("prune", recipe, "--output", tmp_path / "run")
    assert failed.returncode == 2
    assert "3.png" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_all_problems_with_the_world_are_told_at_once_and_nothing_is_written(
    recipe: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "none.safetensors"
    refused = in_this_process(
        *("prune", recipe, "--output", tmp_path / "run", "--set", "model.name=resnet81"),
        *(
            "--set",
            f"model.checkpoint={checkpoint}",
            "--set",
            "benchmark.threads=4096",
            "--set",
            "device=cuda:99",
        ),
    )
    assert refused.returncode == 2
    lines = refused.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any("resnet81" in line and "resnet18" in line for line in lines)
    assert any("4096" in line for line in lines)
    assert any("cuda:99" in line for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cut.target.macs=0.0001", "out of reach"),
        ("training.optimizer=sgdd", "sgd"),
        ("cut.ignore=['*']", "free"),
        ("cut.ignore=[layer9]", "layer9"),
        ("model.name=inception_v3", "image_size"),
        ("data.batch_size=1", "batch_size"),
        ("model.args={features_only: true}", "model.args: test_resnet has no argument features_only"),
        ("data.augment={auto_augment: nonsense}", "nonsense"),
        ("export.opset=3", "opset"),
    ],
)
def test_what_would_fail_after_training_is_refused_before_it(
    override: str, message: str, recipe: Path, tmp_path: Path
) -> None:
    refused = in_this_process("prune", recipe, "--output", tmp_path / "run", "--set", override)
    assert refused.returncode == 2, refused.stderr
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_split_inside_another_is_refused(tmp_path: Path) -> None:
    recipe = folder_recipe(tmp_path, ("dark", "light"), 4)
    refused = in_this_process("validate", recipe, "--set", "data.train=''", "--set", "data.test=test")
    assert refused.returncode == 2
    assert "share" in refused.stderr
    assert "test" in refused.stderr


def test_an_output_that_cannot_be_written_is_refused_before_training(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = in_this_process("prune", recipe, "--output", tmp_path / "file" / "run")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


BLOCKS = """
seed: 0
model: {name: deit3_small_patch16_224, args: {depth: 2, embed_dim: 48, num_heads: 3}}
data: {name: digits, image_size: 16, batch_size: 128}
training: {optimizer: adamw, lr: 0.001}
dense: {epochs: 1}
sparsify: {epochs: 3}
cut: {target: {macs: 0.7}, min_channels: 192, blocks: true}
finetune: {epochs: 1}
benchmark: {threads: 1, rounds: 10}
"""


def test_a_recipe_takes_blocks_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BLOCKS)
    done = in_this_process("prune", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    kept = {layer["name"]: layer["kept"] for layer in report["layers"]}
    gone = [name for name in ("blocks.0", "blocks.1") if kept[name] == 0]
    assert len(gone) == 1
    assert all(kept[name] == 0 for name in kept if name.startswith(f"{gone[0]}."))
    assert report["sparse"]["accuracy_before_cut"] == report["sparse"]["accuracy_after_cut"]
    assert bypassed(sk.load(tmp_path / "run" / "pruned")) == gone
