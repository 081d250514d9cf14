"""A run's files: what may be opened, what may be resumed, and what survives an interruption."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekit.errors import FileError
from sparsekit.runs.run_directory import RunDirectory, changed_keys


def _opened(path: Path, *, resume: bool = False) -> RunDirectory:
    run = RunDirectory(path)
    run.open(resume=resume)
    return run


def _files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_new_directory_holds_an_empty_journal(tmp_path: Path) -> None:
    _opened(tmp_path / "deep" / "run")
    journal = json.loads((tmp_path / "deep" / "run" / "checkpoints" / "journal.json").read_text())
    writer = {"process": os.getpid(), "machine": socket.gethostname()}
    assert journal == {"writer": writer, "stages": [], "code": []}


def test_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    assert _opened(tmp_path).stages == {}


def test_a_directory_with_a_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    run.finish(run.begin("dense", {"epochs": 1}), {"accuracy": 0.5})
    before = _files(tmp_path)
    with pytest.raises(FileError, match=r"already holds a run; go on with --resume, or name another"):
        _opened(tmp_path)
    assert _files(tmp_path) == before


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileError, match="is not empty"):
        _opened(tmp_path)
    assert _files(tmp_path) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_that_is_a_file_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(FileError, match="is a file; name a folder"):
        _opened(tmp_path / "run", resume=resume)


def test_an_output_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file/run cannot be written \(.+\); name another with --output"):
        _opened(tmp_path / "file" / "run")


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileError, match="no run to resume in"):
            _opened(path, resume=True)
    assert not (tmp_path / "missing").exists()


def test_a_resumed_run_knows_stages_results_and_metrics(tmp_path: Path) -> None:
    first = _opened(tmp_path)
    first.finish(first.begin("dense", {"epochs": 2}), {"accuracy": 0.75, "notes": ["a"]})
    first.advance(first.begin("sparsify", {"epochs": 3}), 4.5)
    first.add_metrics({"phase": "dense", "epoch": 0, "loss": 1.25})
    again = _opened(tmp_path, resume=True)
    assert again.result("dense", dict) == {"accuracy": 0.75, "notes": ["a"]}
    assert [(s.name, s.status, s.seconds) for s in again.stages.values()] == [
        ("dense", "done", 0.0),
        ("sparsify", "running", 4.5),
    ]
    assert again.metrics == ({"phase": "dense", "epoch": 0, "loss": 1.25},)


def test_the_seconds_of_an_interrupted_stage_go_on_counting(tmp_path: Path) -> None:
    first = _opened(tmp_path)
    first.advance(first.begin("dense", {}), 7.0)
    again = _opened(tmp_path, resume=True)
    stage = again.begin("dense", {})
    assert stage.seconds == 7.0
    again.advance(stage, stage.seconds + 2.0)
    assert _opened(tmp_path, resume=True).stages["dense"].seconds == 9.0


def test_a_stage_that_has_noted_something_keeps_its_settings(tmp_path: Path) -> None:
    first = _opened(tmp_path)
    assert first.exists
    assert not RunDirectory(tmp_path / "other").exists
    first.begin("attempts", {"epochs": 2})
    first.check_settings("attempts", {"epochs": 3})
    first.note("attempts", {"tried": [1]})
    again = _opened(tmp_path, resume=True)
    assert again.result("attempts", dict) == {"tried": [1]}
    assert not again.is_done("attempts")
    with pytest.raises(FileError, match="epochs"):
        again.check_settings("attempts", {"epochs": 3})


def test_changed_settings_are_refused_by_their_dotted_names(tmp_path: Path) -> None:
    before = {
        "model": {"name": "a", "args": {"depth": 1, "width": 2}},
        "seed": 0,
        "gone": 1,
        "same": {"x": [1]},
    }
    after = {
        "model": {"name": "a", "args": {"depth": 1, "width": 3}},
        "seed": 1,
        "new": 2,
        "same": {"x": [1]},
    }
    begun = _opened(tmp_path)
    begun.finish(begun.begin("dense", before), {})
    again = _opened(tmp_path, resume=True)
    with pytest.raises(FileError) as refused:
        again.begin("dense", after)
    assert "(changed: model.args.width, seed, gone, new)" in str(refused.value)
    assert "stage dense" in str(refused.value)
    again.begin("dense", before)  # the journal still has the first settings
    again.begin("sparsify", after)  # and another stage its own


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoints/journal.json", "{"),
        ("checkpoints/journal.json", "[]"),
        ("checkpoints/journal.json", '{"stages": [{"status": "done"}]}'),
        ("checkpoints/journal.json", '{"stages": [{"name": "dense", "colour": "red"}]}'),
        ("checkpoints/journal.json", "\xff\xfe"),
        ("checkpoints/journal.json", '{"stages": [1]}'),
        ("checkpoints/journal.json", "[" * 100_000),
    ],
)
def test_a_damaged_run_cannot_be_resumed_and_is_left_as_it_was(
    tmp_path: Path, name: str, content: str
) -> None:
    run = _opened(tmp_path)
    run.add_metrics({"phase": "dense", "epoch": 0})
    (tmp_path / name).write_text(content, encoding="latin-1")
    before = _files(tmp_path)
    with pytest.raises(FileError, match=rf"{name} is damaged, .*start it in another --output"):
        _opened(tmp_path, resume=True)
    assert _files(tmp_path) == before


def test_each_change_of_the_code_is_noted_once_and_found_again(tmp_path: Path) -> None:
    files = _opened(tmp_path / "run")
    for hashes in ({}, {"nets": "1"}, {"nets": "1"}, {"nets": "2", "layers": "3"}):
        files.note_code(hashes)
    again = _opened(tmp_path / "run", resume=True)
    assert again.code == [{"nets": "1"}, {"nets": "2", "layers": "3"}]
    assert changed_keys(*again.code) == ["nets", "layers"]


def test_an_epoch_that_is_repeated_replaces_its_row(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    for phase, epoch, loss in (("dense", 0, 3.0), ("dense", 1, 2.0), ("sparsify", 1, 9.0), ("dense", 1, 1.0)):
        run.add_metrics({"phase": phase, "epoch": epoch, "loss": loss})
    expected = [("dense", 0, 3.0), ("sparsify", 1, 9.0), ("dense", 1, 1.0)]
    assert [(r["phase"], r["epoch"], r["loss"]) for r in run.metrics] == expected
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert tuple(lines) == run.metrics


def test_the_log_has_one_line_a_message_with_its_time(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    run.log("begins")
    _opened(tmp_path, resume=True).log("goes on")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["begins", "goes on"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    main = _opened(tmp_path)
    main.begin("dense", {})
    before = _files(tmp_path)
    other = RunDirectory(tmp_path, writes=False)
    other.open(resume=True)
    other.finish(other.begin("dense", {}), {"accuracy": 1.0})
    other.add_metrics({"phase": "dense", "epoch": 0})
    other.log("hello")
    assert _files(tmp_path) == before
    assert other.result("dense", dict) == {"accuracy": 1.0}


def test_a_stage_that_left_nothing_behind_may_begin_again_with_other_settings(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    run.begin("sparsify", {"target": 0.001})
    assert run.begin("sparsify", {"target": 0.5}).settings == {"target": 0.5}
    (run.checkpoints / "sparsify.state.safetensors").touch()
    with pytest.raises(FileError, match="target"):
        run.begin("sparsify", {"target": 0.7})


def test_a_damaged_line_of_metrics_is_dropped_and_told(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    for epoch in range(3):
        run.add_metrics({"phase": "dense", "epoch": epoch})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:-4], "\xff", "[]", lines[2]]))
    again = _opened(tmp_path, resume=True)
    assert [row["epoch"] for row in again.metrics] == [0, 2]
    assert [remark.partition(" of ")[0] for remark in again.remarks] == ["line 2", "line 3", "line 4"]


@pytest.mark.parametrize("left", [[], ["checkpoints/"], ["checkpoints/.journal.json.ab12.tmp", ".lock"]])
def test_a_directory_whose_process_died_before_it_wrote_is_new(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("half")
    with pytest.raises(FileError, match=r"no run to resume in .*; start it without --resume"):
        _opened(tmp_path / "run", resume=True)
    _opened(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.tmp"))
    _opened(tmp_path / "run", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_its_journal_is_told_as_that(tmp_path: Path, resume: bool) -> None:
    run = _opened(tmp_path)
    (run.checkpoints / "dense.safetensors").write_text("weights")
    (run.checkpoints / "journal.json").unlink()
    with pytest.raises(FileError, match=r"without its journal, checkpoints/journal\.json; put it back"):
        _opened(tmp_path, resume=resume)


WRITER = """
import sys, time
from pathlib import Path
from sparsekit.runs.run_directory import RunDirectory
files = RunDirectory(Path(sys.argv[1]), locks=True)
files.open(resume=False)
print("open", flush=True)
time.sleep(120)
"""


def test_one_process_writes_and_its_death_lets_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        before = _files(tmp_path)
        second = RunDirectory(tmp_path / "run", locks=True)
        named = f"is being written by process {other.pid} on {socket.gethostname()}; wait until it ends"
        with pytest.raises(FileError, match=named):
            second.open(resume=True)
        assert _files(tmp_path) == before
        RunDirectory(tmp_path / "run", writes=False, locks=True).open(resume=True)  # who reads needs no lock
        other.send_signal(signal.SIGKILL)
        other.wait()
    second.open(resume=True)
    second.close()
    assert not (tmp_path / "run" / ".lock").exists()


def test_files_that_a_stage_left_are_known_by_their_content(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"0123456789")
    run.finish(run.begin("export", {}), {}, ("a", "b", "c"))
    again = _opened(tmp_path, resume=True)
    assert again.changed_files(again.stages["export"]) == []
    (tmp_path / "a").write_bytes(b"0123456788")
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "c").unlink()
    assert again.changed_files(again.stages["export"]) == [
        "a is not the file that it left",
        "b is not the file that it left",
        "c is gone",
    ]
