"""A run directory on disk: its recipe, journal of stages, metrics and log. All but the log are written atomically.

recipe.yaml             the resolved recipe
metrics.jsonl           one line for each epoch of a phase
run.log                 what happened when
checkpoints/            journal.json (stages, seconds, results, code), weights and training states
attempts/               the run directories of attempts (cut.target.max_accuracy_drop)
dense.onnx pruned.onnx pruned/ report.json report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sparsekit.errors import FileError, first_line
from sparsekit.files import write_json, write_text
from sparsekit.runs.results import Result, as_json, from_json


@dataclass
class StageRecord:
    """One stage: "running" or "done", its seconds over all starts, its result, and the settings it depends on."""

    name: str
    status: str
    seconds: float
    settings: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)


class RunDirectory:
    """Reads and writes the files of one run. Of several processes only the main one `writes`."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.stages: dict[str, StageRecord] = {}
        self.code: list[
            dict[str, str]
        ] = []  # hashes of a network of one's own: one entry, and one for each change
        self._metrics: list[dict[str, Any]] = []

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

        Raises FileError if it is not empty and `resume` is false, holds no run and `resume` is true, or cannot be
        written.
        """
        occupied = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if occupied and not self.path.is_dir():
            raise FileError(f"the output {self.path} is a file; name a folder with --output")
        if occupied and not resume:
            what = "already holds a run" if self._journal.exists() else "is not empty"
            raise FileError(
                f"the output {self.path} {what}; go on with --resume, or name another with --output"
            )
        if resume and not self._journal.exists():
            raise FileError(f"there is no run to resume in {self.path}; start it without --resume")
        if resume:
            self._read_journal()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if self.writes:
                self._write_journal()
        except OSError as error:
            raise FileError(
                f"the output {self.path} cannot be written ({error.strerror or error}); name another with --output"
            ) from error

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

    def finish(self, stage: StageRecord, result: object) -> None:
        """Note that a stage is done, and its result (one of `results`)."""
        stage.status, stage.result = "done", as_json(result)
        self._write_journal()

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
        metrics = self.path / "metrics.jsonl"
        with _refusing_damage(metrics):
            lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
            self._metrics = [json.loads(line) for line in lines]

    def _write_journal(self) -> None:
        if self.writes:
            stages = [vars(stage) for stage in self.stages.values()]
            write_json(self._journal, {"stages": stages, "code": self.code})


@contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
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
