"""A run directory on disk: its recipe, its journal of stages, its metrics and its log. Every file is atomic.

recipe.yaml             the resolved recipe
metrics.jsonl           one line an epoch and phase
run.log                 what happened when
checkpoints/            journal.json (stages, seconds, results), weights and training states
attempts/               run directories of models that were tried on the way (cut.target.max_accuracy_drop)
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

from sparsekit.errors import FileError
from sparsekit.files import write_json, write_text
from sparsekit.runs.results import Result, as_json, from_json


@dataclass
class StageRecord:
    """One stage: "running" or "done", seconds over all attempts, what it found, and the settings it depends on."""

    name: str
    status: str
    seconds: float
    settings: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)


class RunDirectory:
    """Reads and writes one run's files. In a run of several processes only the main one writes (`writes`)."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.stages: dict[str, StageRecord] = {}
        self._metrics: list[dict[str, Any]] = []

    @property
    def checkpoints(self) -> Path:
        """Folder of weights and training states."""
        return self.path / "checkpoints"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self._journal.exists()

    def open(self, *, resume: bool) -> None:
        """Create the directory, or read the journal of the run it holds.

        Raises FileError if it holds anything and `resume` is not asked for, holds no run although it is, or
        cannot be written.
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
        """Raise FileError if the stage was begun with other settings, naming the keys that changed.

        A stage that left nothing behind yet (no training state, no note) may begin again with other settings: that is
        how a mistake that only showed there is mended without losing the stages before.
        """
        found = self.stages.get(name)
        if found is None:
            return
        if found.status == "running" and not found.result and not self.training_states(name):
            return
        changed = _changed_keys(found.settings, settings)
        if changed:
            raise FileError(
                f"the stage {name} of the run in {self.path} was begun with other settings (changed: "
                f"{', '.join(changed)}); resume with those it began with, or name another --output"
            )

    def training_states(self, name: str) -> list[Path]:
        """The state files of a training stage that is not finished."""
        return list(self.checkpoints.glob(f"{name}*.state.safetensors"))

    def begin(self, name: str, settings: Mapping[str, Any]) -> StageRecord:
        """Note that a stage has begun, or goes on after an interruption; its seconds go on counting.

        Raises FileError if the stage was begun with other settings.
        """
        self.check_settings(name, settings)
        if name not in self.stages:
            self.stages[name] = StageRecord(name, "running", 0.0, dict(settings))
        self.stages[name].settings = dict(settings)
        self._write_journal()
        return self.stages[name]

    def advance(self, stage: StageRecord, seconds: float) -> None:
        """Set a running stage's seconds."""
        stage.seconds = seconds
        self._write_journal()

    def finish(self, stage: StageRecord, result: object) -> None:
        """Note that a stage is done and what it found, one of `results`."""
        stage.status, stage.result = "done", as_json(result)
        self._write_journal()

    def note(self, name: str, found: object) -> None:
        """Note what a stage that goes on has found so far; from then on it keeps its settings."""
        self.stages[name].result = as_json(found)
        self._write_journal()

    def is_done(self, name: str) -> bool:
        """Whether a stage is finished."""
        return name in self.stages and self.stages[name].status == "done"

    def has_result(self, name: str) -> bool:
        """Whether a stage has found anything: it is done, or goes on and has noted something."""
        return name in self.stages and bool(self.stages[name].result)

    def result(self, name: str, kind: type[Result]) -> Result:
        """What a finished stage found, or what one that goes on has noted so far.

        Raises FileError if the journal holds no such result.
        """
        with _refusing_damage(self._journal):
            return from_json(kind, self.stages[name].result)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one epoch; a row of the same phase and epoch is replaced."""
        key = (row["phase"], row["epoch"])
        self._metrics = [old for old in self._metrics if (old["phase"], old["epoch"]) != key]
        self._metrics.append(dict(row))
        if self.writes:
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in self._metrics))

    @property
    def metrics(self) -> tuple[dict[str, Any], ...]:
        """Every epoch so far, in order."""
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
            rows = json.loads(self._journal.read_text(encoding="utf-8"))["stages"]
            self.stages = {row["name"]: StageRecord(**row) for row in rows}
        metrics = self.path / "metrics.jsonl"
        with _refusing_damage(metrics):
            lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
            self._metrics = [json.loads(line) for line in lines]

    def _write_journal(self) -> None:
        if self.writes:
            write_json(self._journal, {"stages": [vars(stage) for stage in self.stages.values()]})


@contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{file} is damaged ({error}); the run cannot be resumed, start it in another --output"
        ) from error


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two nested mappings differ."""
    changed = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += _changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key}")
    return changed
