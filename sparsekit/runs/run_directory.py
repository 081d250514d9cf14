"""A run directory on disk: its recipe, journal of stages, metrics and log. All but the log are written atomically.

recipe.yaml             the resolved recipe
.lock                   held by the process that writes; its death lets go of it
metrics.jsonl           one line for each epoch of a phase
run.log                 what happened when
checkpoints/            journal.json (who wrote last; stages, seconds, results, files; code), weights and states
attempts/               the run directories of attempts (cut.target.max_accuracy_drop)
dense.onnx pruned.onnx pruned/ report.json report.html
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsekit.errors import FileError, first_line
from sparsekit.files import is_temporary, sha256_of, write_json, write_text
from sparsekit.runs.results import Result, as_json, from_json


@dataclass
class StageRecord:
    """One stage: "running" or "done", its seconds over all starts, its result, and the settings it depends on.

    `files` are those that it left, by their path in the directory, with size and SHA-256.
    """

    name: str
    status: str
    seconds: float
    settings: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)


class RunDirectory:
    """Reads and writes the files of one run. Of several processes only the main one `writes`.

    `locks`: no other process may write there while this one does, until `close` or death.
    """

    def __init__(self, path: Path, *, writes: bool = True, locks: bool = False) -> None:
        self.path = path
        self.writes = writes
        self.stages: dict[str, StageRecord] = {}
        # Hashes of a network of one's own: one entry, and one for each change.
        self.code: list[dict[str, str]] = []
        # What was found to be wrong, and could be mended.
        self.remarks: list[str] = []
        self._metrics: list[dict[str, Any]] = []
        self._lock = FileLock(path / ".lock", timeout=0) if locks and writes else None

    @property
    def checkpoints(self) -> Path:
        """The folder of weights and training states."""
        return self.path / "checkpoints"

    @property
    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return self._journal.exists()

    def open(self, *, resume: bool) -> None:
        """Create the directory, or read the journal of the run it holds.

        A directory in which a process died before it wrote anything counts as empty. Raises FileError if it is not
        empty and `resume` is false, holds no run and `resume` is true, cannot be written, or another process writes.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileError(f"the output {self.path} is a file; name a folder with --output")
        if not resume and _holds_anything(self.path):
            raise FileError(self._why_occupied())
        if resume and not self._journal.exists():
            raise FileError(
                self._why_occupied()
                if _holds_anything(self.path)
                else f"there is no run to resume in {self.path}; start it without --resume"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if resume:
                self._read_journal()
            if self.writes:
                self._remove_temporary_files()
                self._write_journal()
        except OSError as error:
            raise FileError(
                f"the output {self.path} cannot be written ({error.strerror or error}); name another with --output"
            ) from error

    def close(self) -> None:
        """Let other processes write."""
        if self._lock is not None and self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _take_lock(self) -> None:
        if self._lock is None:
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise FileError(
                f"the output {self.path} is being written by {self._writer()}; wait until it ends, or name another "
                "with --output"
            ) from None
        except NotImplementedError:
            self.remarks.append(f"the file system of {self.path} has no locks: start no second run there")

    def _writer(self) -> str:
        """Who wrote the journal last, in words."""
        try:
            writer = json.loads(self._journal.read_text(encoding="utf-8"))["writer"]
            return f"process {int(writer['process'])} on {str(writer['machine'])[:80]}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def _why_occupied(self) -> str:
        if self._journal.exists():
            return f"the output {self.path} already holds a run; go on with --resume, or name another with --output"
        if self.checkpoints.is_dir():
            return (
                f"the output {self.path} holds a run without its journal, {self._journal.relative_to(self.path)}; "
                "put it back, or name another with --output"
            )
        return f"the output {self.path} is not empty; name another with --output"

    def _remove_temporary_files(self) -> None:
        """Remove what killed processes left half-written."""
        for file in self.path.rglob(".*.tmp"):
            if file.is_file() and not file.is_symlink():
                file.unlink(missing_ok=True)

    def check_settings(self, name: str, settings: Mapping[str, Any]) -> None:
        """Raise FileError if the stage was begun with other settings; the message names the keys that changed.

        A stage that has left nothing yet (no training state, no note) may begin again with other settings. So a
        mistake that shows there can be corrected without losing the stages before.
        """
        found = self.stages.get(name)
        if found is None:
            return
        if found.status == "running" and not found.result and not self.training_states(name):
            return
        changed = changed_keys(found.settings, settings)
        if changed:
            raise FileError(
                f"the stage {name} of the run in {self.path} was begun with other settings (changed: "
                f"{', '.join(changed)}); resume with those it began with, or name another --output"
            )

    def training_states(self, name: str) -> list[Path]:
        """List the state files of a training stage that is not finished."""
        return list(self.checkpoints.glob(f"{name}*.state.safetensors"))

    def begin(self, name: str, settings: Mapping[str, Any]) -> StageRecord:
        """Note that a stage has begun, or continues after an interruption. Its seconds go on counting.

        Raises FileError if the stage was begun with other settings.
        """
        self.check_settings(name, settings)
        if name not in self.stages:
            self.stages[name] = StageRecord(name, "running", 0.0, dict(settings))
        self.stages[name].settings = dict(settings)
        self._write_journal()
        return self.stages[name]

    def advance(self, stage: StageRecord, seconds: float) -> None:
        """Set the seconds of a running stage."""
        stage.seconds = seconds
        self._write_journal()

    def finish(self, stage: StageRecord, result: object, leaves: Sequence[str] = ()) -> None:
        """Note that a stage is done, its result (one of `results`), and the files that it leaves."""
        stage.status, stage.result = "done", as_json(result)
        if self.writes:
            stage.files = {leaf: self._measured(leaf) for leaf in leaves}
        self._write_journal()

    def changed_files(self, stage: StageRecord) -> list[str]:
        """The files of a stage that is done which are gone, or not what it left, in words."""
        changed = []
        for leaf, left in stage.files.items():
            if not (self.path / leaf).is_file():
                changed.append(f"{leaf} is gone")
            elif self._measured(leaf) != left:
                changed.append(f"{leaf} is not the file that it left")
        return changed

    def _measured(self, leaf: str) -> list[Any]:
        return [(self.path / leaf).stat().st_size, sha256_of(self.path / leaf)]

    def note(self, name: str, found: object) -> None:
        """Note what a running stage has found so far. From then on its settings may not change."""
        self.stages[name].result = as_json(found)
        self._write_journal()

    def note_code(self, hashes: Mapping[str, str]) -> None:
        """Note the code that the run goes on with, unless it is what it went on with before."""
        if hashes and self.code[-1:] != [dict(hashes)]:
            self.code.append(dict(hashes))
            self._write_journal()

    def is_done(self, name: str) -> bool:
        """Whether a stage is done."""
        return name in self.stages and self.stages[name].status == "done"

    def has_result(self, name: str) -> bool:
        """Whether a stage is done, or is running and has noted something."""
        return name in self.stages and bool(self.stages[name].result)

    def result(self, name: str, kind: type[Result]) -> Result:
        """Return the result of a stage, or what it has noted so far.

        Raises FileError if the journal holds no such result.
        """
        with _refusing_damage(self._journal):
            return from_json(kind, self.stages[name].result)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Add the row of one epoch. It replaces a row of the same phase and epoch."""
        key = (row["phase"], row["epoch"])
        self._metrics = [old for old in self._metrics if (old["phase"], old["epoch"]) != key]
        self._metrics.append(dict(row))
        if self.writes:
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in self._metrics))

    @property
    def metrics(self) -> tuple[dict[str, Any], ...]:
        """The rows of all epochs so far, in order."""
        return tuple(self._metrics)

    def log(self, message: str) -> None:
        """Add a line with the time of day (UTC) to run.log."""
        if self.writes:
            now = datetime.fromtimestamp(time.time(), tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
            with (self.path / "run.log").open("a", encoding="utf-8") as file:
                file.write(f"{now} {message}\n")

    @property
    def _journal(self) -> Path:
        return self.checkpoints / "journal.json"

    def _read_journal(self) -> None:
        with _refusing_damage(self._journal):
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            self.stages = {row["name"]: StageRecord(**row) for row in journal["stages"]}
            self.code = [dict(hashes) for hashes in journal.get("code", [])]
        self._metrics = list(self._read_metrics())

    def _read_metrics(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl. They are only shown, so a damaged one is dropped, and that is said."""
        file = self.path / "metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not {"phase", "epoch"} <= row.keys():
                    raise ValueError("it has no phase and epoch")
            except (ValueError, AttributeError, RecursionError):
                self.remarks.append(f"line {number} of {file} is damaged, and was dropped")
            else:
                yield row

    def _write_journal(self) -> None:
        if self.writes:
            writer = {"process": os.getpid(), "machine": socket.gethostname()}
            stages = [vars(stage) for stage in self.stages.values()]
            write_json(self._journal, {"writer": writer, "stages": stages, "code": self.code})


def _holds_anything(folder: Path) -> bool:
    """Whether there is anything but the lock, empty folders of ours, and files that were never finished."""
    if not folder.is_dir():
        return False
    for path in folder.iterdir():
        if path.name in ("checkpoints", "attempts") and path.is_dir() and not path.is_symlink():
            if _holds_anything(path):
                return True
        elif path.name != ".lock" and not is_temporary(path):
            return True
    return False


@contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(
            f"{file} is damaged, or of another version of sparsekit ({first_line(error)}); the run cannot be resumed, "
            "start it in another --output"
        ) from error


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted names of the values in which two nested mappings differ."""
    changed = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key}")
    return changed
