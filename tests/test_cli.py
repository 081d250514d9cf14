"""The command line, as a process where it can be and with a stand-in for the pipeline where that would train."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from tiny_run import in_this_process

import sparsekit
from sparsekit.cli import main
from sparsekit.errors import DataError, FileError, TrainingError
from sparsekit.latency.compare import Interval, Latency, LatencyComparison
from sparsekit.recipe.reading import load_recipe

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def run(
    *args: str | Path, cwd: Path | None = None, columns: int = 120, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsekit", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    # Read by rich and typer; a width the outer terminal happens to have must not break lines here.
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, text=True, check=False, env=environment, **pipes)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command line in this process, with `pipeline` for the pipeline: code, stdout, stderr."""

    def call(*args: str | Path, **pipeline: Any) -> tuple[int, str, str]:
        stand_in = SimpleNamespace(**pipeline)
        for name in ("pipeline", "commands", "rehearsal"):
            monkeypatch.setitem(sys.modules, f"sparsekit.runs.{name}", stand_in)
            monkeypatch.setattr(sparsekit.runs, name, stand_in, raising=False)
        monkeypatch.setattr(sys, "argv", ["sparsekit", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def raising(error: BaseException) -> Any:
    def raise_it(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raise_it


# ----------------------------------------------------------------------------------------------- as a process


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert not done.stderr
    for command in ("prune", "validate", "inspect", "bench", "export", "report", "init"):
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("command", ["prune", "validate", "inspect", "bench", "export", "report", "init"])
def test_every_command_has_help(command: str, call: Any) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert "Usage:" in out


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"sparsekit {sparsekit.__version__}\n")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_slow(option: str) -> None:
    code = (
        "import sys; from sparsekit.cli import main; sys.argv = ['sparsekit', sys.argv[1]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'timm', 'numpy', 'onnx', 'onnxruntime', 'accelerate', 'matplotlib', 'pydantic', 'yaml'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrong_option_is_a_usage_error() -> None:
    done = run("prune", "--nonsense")
    assert done.returncode == 2
    assert "Usage:" in done.stderr


@pytest.mark.parametrize("command", ["prune", "validate"])
def test_all_mistakes_of_a_recipe_one_line_each(command: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    good = QUICKSTART.read_text(encoding="utf-8")
    bad.write_text(re.sub(r"dense:\n  epochs: \d+", "dense:\n  epoch: ten", good), encoding="utf-8")
    done = run(command, bad, "--set", "data.batch_size=many", "--set", "seed", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") for line in lines)
    assert any(
        line.startswith("error: unknown key dense.epoch; did you mean dense.epochs? (") for line in lines
    )
    assert lines[-1].startswith("error: an override must be path.to.key=value, ")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("command", ["prune", "validate", "inspect"])
def test_a_missing_recipe(command: str, tmp_path: Path) -> None:
    done = run(command, tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe ")
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_init_writes_a_recipe_that_loads_and_replaces_nothing(tmp_path: Path) -> None:
    done = run("init", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "wrote recipe.yaml; run it with: sparsekit prune recipe.yaml\n"
    path = tmp_path / "recipe.yaml"
    load_recipe(path)

    path.write_text("mine", encoding="utf-8")
    done = run("init", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: recipe.yaml is already there; name another file, or replace it with --force\n"
    )
    assert path.read_text(encoding="utf-8") == "mine"

    assert run("init", "--force", cwd=tmp_path).returncode == 0
    load_recipe(path)


def test_init_refuses_a_directory(tmp_path: Path) -> None:
    done = run("init", tmp_path, "--force")
    assert done.returncode == 2
    assert "got a directory" in done.stderr


def test_a_reader_that_went_away_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run("init", cwd=tmp_path, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("init", cwd=tmp_path, stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_bench_as_a_process(tmp_path: Path) -> None:
    path = tmp_path / "relu.onnx"
    shape = [1, 3, 32, 32]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    done = run("bench", path, path, "--rounds", "10", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert [one["path"] for one in measured["latencies"]] == [str(path)] * 2
    assert measured["rounds"] == 10

    done = run("bench", path, "--provider", "cuda", "--json")
    if done.returncode:  # where there is no GPU
        assert done.returncode == 2
        assert re.search(r"error: provider cuda is .*(install onnxruntime-gpu|does not start)", done.stderr)
    done = run("bench", path, "--provider", "abacus")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "provider must be one of cpu, cuda" in done.stderr

    path.write_bytes(b"not a model")
    done = run("bench", path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("sparsekit.runs.pipeline") is None, reason="needs the pipeline")
def test_validate_as_a_process() -> None:
    done = run("validate", QUICKSTART)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout


def test_inspect_as_a_process_fits_a_narrow_terminal() -> None:
    done = run("inspect", "test_vit", columns=80)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "stays whole: it reaches the model's output" in done.stdout
    assert "units of 96 rows; read by blocks.0.attn.proj" in done.stdout
    assert "12 of 14 groups can be cut" in done.stdout


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "sparsekit/99"}', '{"format": "sparsekit/1"}'])
def test_a_damaged_artifact_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "structure.json").write_text(text, encoding="utf-8")
    done = in_this_process("export", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'structure.json'} ")


@pytest.mark.parametrize("size", ["3x8x8", 8, [3, 8], [3, 8, -8], [3, 8, "8"]])
def test_an_artifact_whose_notes_give_no_input_size_is_one_line(size: object, tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=4)
    sparsekit.save(model, tmp_path / "pruned", info={"input_size": size})
    done = in_this_process("export", tmp_path / "pruned")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'pruned'}/structure.json does not say the input size")


# ----------------------------------------------------------------------------------- with a stand-in pipeline


def test_validate_prints_a_summary_or_every_problem(call: Any) -> None:
    code, out, err = call("validate", QUICKSTART, check_inputs=lambda recipe: [])
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"{QUICKSTART}: ok"
    assert "resnet18, from scratch" in out
    code, out, err = call("validate", QUICKSTART, check_inputs=lambda recipe: ["no such model", "no data"])
    assert (code, out, err) == (2, "", "error: no such model\nerror: no data\n")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "runs/quickstart"),
        (["--set", "output=there"], "there"),
        (["--set", "output=there", "--output", "here"], "here"),
    ],
)
def test_prune_passes_recipe_output_and_resume(
    args: list[str], expected: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def prune(recipe: Any, **kwargs: Any) -> str:
        seen.update(kwargs, recipe=recipe)
        return "the report"

    monkeypatch.setattr(
        "sparsekit.report.terminal.terminal_table", lambda report, directory: f"{report} of {directory}"
    )
    code, out, _ = call("prune", QUICKSTART, "--set", "seed=7", "--resume", *args, prune=prune)
    assert code == 0
    assert out == f"the report of {expected}\n"
    assert (seen["recipe"].seed, seen["output"], seen["resume"]) == (7, Path(expected), True)
    assert seen["console"].stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("images/train holds no images"), 2, "error: images/train holds no images\n"),
        (FileError("one\ntwo"), 2, "error: one\nerror: two\n"),
        (TrainingError("the loss became NaN"), 1, "error: the loss became NaN\n"),
        (OSError(28, "No space left on device", "runs/x"), 1, "error: No space left on device: runs/x\n"),
        (PermissionError(13, "Permission denied"), 1, "error: Permission denied\n"),
    ],
)
def test_errors_become_messages_and_exit_codes(error: Exception, code: int, message: str, call: Any) -> None:
    assert call("prune", QUICKSTART, prune=raising(error)) == (code, "", message)


def test_a_bug_says_so_with_its_traceback(call: Any) -> None:
    code, out, err = call("prune", QUICKSTART, prune=raising(RuntimeError("boom")))
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert "RuntimeError: boom" in err
    assert err.splitlines()[-1] == (
        "error: RuntimeError that sparsekit did not expect: a bug of ours, please report the lines above"
    )


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_an_interrupted_run_says_how_to_go_on(resume: list[str], call: Any, tmp_path: Path) -> None:
    args = ["prune", str(QUICKSTART), "--output", str(tmp_path), *resume, "--set", "cut.target={macs: 0.4}"]
    code, out, err = call(*args, prune=raising(KeyboardInterrupt()))
    assert (code, out) == (130, "")
    assert err == (
        f"interrupted: go on with: sparsekit prune {QUICKSTART} --output {tmp_path} "
        "--set 'cut.target={macs: 0.4}' --resume\n"
    )


def test_a_run_interrupted_before_it_began_has_nothing_to_resume(call: Any, tmp_path: Path) -> None:
    args = ["prune", str(QUICKSTART), "--output", str(tmp_path / "none")]
    code, _, err = call(*args, prune=raising(KeyboardInterrupt()))
    assert (code, err) == (130, "interrupted: nothing was begun\n")


def test_inspect_takes_a_model_or_a_recipe(call: Any) -> None:
    seen: list[Any] = []

    def inspect_model(name: str, *, image_size: int | None, recipe: Any, **asked: bool) -> Any:
        seen.append((name, image_size, recipe and recipe.data.name, *(key for key in asked if asked[key])))
        return SimpleNamespace(table=lambda: "a table", to_json=lambda: {"groups": []})

    assert call("inspect", "vit_tiny", "--image-size", "64", inspect_model=inspect_model)[:2] == (
        0,
        "a table\n",
    )
    asked = ("--through-layer-norm", "--blocks")
    code, out, _ = call("inspect", QUICKSTART, "--json", *asked, inspect_model=inspect_model)
    assert (code, json.loads(out)) == (0, {"groups": []})
    assert seen == [("vit_tiny", 64, None), ("resnet18", None, "digits", "through_layer_norm", "blocks")]


def test_export_prints_the_file_it_wrote(call: Any) -> None:
    seen: dict[str, Any] = {}

    def export_again(source: Path, **kwargs: Any) -> Path:
        seen.update(kwargs, source=source)
        return Path("out.onnx")

    args = ("export", "runs/x", "--opset", "18", "--batch-size", "4", "--dynamic-batch")
    assert call(*args, export_again=export_again) == (0, "out.onnx\n", "")
    assert seen == {
        "source": Path("runs/x"),
        "output": None,
        "opset": 18,
        "batch_size": 4,
        "dynamic_batch": True,
        "merge_groups": True,
        "factory": None,
    }


def test_report_prints_the_table(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.report.terminal.terminal_table", lambda report, run: f"{report} {run}")
    assert call("report", "runs/x", report_again=lambda run: "table of") == (0, "table of runs/x\n", "")


def test_bench_shows_speedup_interval_and_null(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = LatencyComparison(
        latencies=(Latency("[a].onnx", 2.0, 1.9, 2.2, 4, 3.125), Latency("b.onnx", 0.8, 0.75, 0.9, 4, 1.0)),
        speedups=(Interval(2.5, 2.4, 2.6),),
        null=Interval(1.01, 1.0, 1.02),
        threads=2,
        batch=4,
        rounds=50,
        trustworthy=True,
        reason="",
    )
    monkeypatch.setattr("sparsekit.latency.compare.compare_latency", lambda files, **kwargs: comparison)
    code, out, _ = call("bench", "[a].onnx", "b.onnx", "--threads", "2", "--rounds", "50")
    assert code == 0
    figures = ("2.000", "1.900 to 2.200", "3.125", "2000", "5000", "2.50", "2.40 to 2.60")
    for text in ("[a].onnx", *figures, "1.010, 1.000 to 1.020"):
        assert text in out
    assert "batch 4, threads 2, rounds 50" in out

    noisy = replace(comparison, trustworthy=False, reason="the machine is busy")
    monkeypatch.setattr("sparsekit.latency.compare.compare_latency", lambda files, **kwargs: noisy)
    code, out, _ = call("bench", "[a].onnx", "b.onnx")
    assert code == 0
    assert "2.50" not in out
    assert "noisy" in out
    assert "no speed-up stated: the machine is busy" in out


def test_bench_gives_a_table_for_every_batch(tmp_path: Path) -> None:
    path = tmp_path / "relu.onnx"
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 32, 32])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    done = run("bench", path, "--rounds", "10", "--batch", "1", "--batch", "8")
    assert done.returncode == 0, done.stderr
    assert "batch 1, threads 1" in done.stdout
    assert "batch 8, threads 1" in done.stdout
    narrow = run("bench", path, path, "--rounds", "10", cwd=tmp_path, columns=80)
    rows = narrow.stdout.splitlines()
    assert max(map(len, rows)) <= 80
    assert "file " in rows[1]
    assert "relu.onnx" in "".join(row.strip().split(" ")[0] for row in rows)
    assert re.search(r"\d\.\d\d to \d\.\d\d *$|noisy", narrow.stdout, flags=re.M)
    done = run("bench", path, "--rounds", "10", "--batch", "1", "--batch", "8", "--json")
    assert [one["batch"] for one in json.loads(done.stdout)] == [1, 8]
