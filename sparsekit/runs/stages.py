"""What a stage is, and how one is run: noted in the journal, and skipped if it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sparsekit.errors import FileError
from sparsekit.runs.results import CutResult, TestedCut
from sparsekit.runs.run import Run


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    It resumes only with the settings it began with: `sections` of the recipe, seed, precision and images. A section may
    be one key of it (sparsify.epochs). `cut.attempts` may change. `leaves` are the files, below the run directory, that
    exist when it is done. One that `remakes` them does so at no cost.
    """

    name: str
    body: Callable[[Run, Callable[[], None]], object]
    sections: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    remakes: bool = False

    def settings(self, run: Run) -> dict[str, Any]:
        """Return the settings that it depends on."""
        values = run.recipe.model_dump(mode="json")
        del values["cut"]["attempts"]
        kept: dict[str, Any] = {"images": run.inputs.fingerprint}
        for section in ("seed", "precision", *self.sections):
            name, _, key = section.partition(".")
            if key:
                kept.setdefault(name, {})[key] = values[name][key]
            else:
                kept[name] = values[name]
        return kept


def artifact(folder: str) -> tuple[str, str]:
    """The files of an artifact in the run directory, which a stage leaves."""
    return f"{folder}/model.safetensors", f"{folder}/structure.json"


def run_stage(run: Run, stage: Stage, *, also: Callable[[], None] = lambda: None) -> None:
    """Run a stage unless it is done. Its `tick` notes the seconds so far, over all starts, and calls `also`."""
    name = stage.name
    record = run.files.begin(name, stage.settings(run))
    changed = run.files.changed_files(record) if record.status == "done" else []
    if changed and not stage.remakes:
        raise FileError(
            f"the stage {name} of the run in {run.files.path} is done, but {', '.join(changed)}; put it back, or start "
            "again in another --output"
        )
    if record.status == "done" and not changed:
        run.say(f"{name}: done before")
        return
    started = time.monotonic() - record.seconds

    def tick() -> None:
        run.files.advance(record, time.monotonic() - started)
        also()

    run.say(f"{name} ...")
    try:
        result = stage.body(run, tick)
    except BaseException as error:
        with suppress(OSError):  # of a full disk, this line would hide the message
            run.files.log(f"{name}: stopped by {type(error).__name__}: {error}")
        raise
    run.accelerator.wait_for_everyone()
    tick()
    run.files.finish(record, result, stage.leaves)
    if run.files.writes:
        for state in run.files.training_states(name):
            state.unlink()  # only an unfinished stage needs it
    run.accelerator.wait_for_everyone()
    told = f"; {result}" if isinstance(result, (CutResult, TestedCut)) else ""
    run.say(f"{name}: {record.seconds:.1f} s{told}")
