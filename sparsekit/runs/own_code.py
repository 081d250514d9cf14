"""The code of a network of one's own: noted when a run begins, and looked at again when it is resumed."""

from __future__ import annotations

import torch

from sparsekit.errors import FileError
from sparsekit.evaluation import comparing
from sparsekit.runs.results import DenseResult
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import changed_keys

# Other code for the same function may add in another order.
_TOLERANCE = 1e-3


def check_code(run: Run) -> None:
    """Note the code of the model. If it has changed since the run was last begun, say so.

    A run may go on with changed code, because a mistake that shows after hours, in the export say, could not be mended
    otherwise. But the trained dense model must answer as before, or the stages would not be of one model. Raises
    FileError if it does not, before anything is written.
    """
    if run.recipe.model.factory is None:
        return
    changed = run.by_the_first(lambda: _checked_changes(run))
    if changed:
        run.say(f"warning: the code of {' and '.join(changed)} has changed since the run began")
    run.files.note_code(run.inputs.code)


def dense_answers(run: Run) -> tuple[float, ...]:
    """What the trained dense model answers to two fixed inputs, on the CPU."""
    inputs = torch.randn(2, *run.inputs.config.input_size, generator=torch.Generator().manual_seed(0))
    model = run.weights("dense").cpu()
    with comparing(model):
        outputs = model(inputs)
    return tuple(outputs.flatten().tolist())


def _checked_changes(run: Run) -> list[str]:
    """Names of the modules that have changed. Raises FileError if the dense model answers otherwise than it did."""
    if not run.files.code:
        return []
    changed = changed_keys(run.files.code[-1], run.inputs.code)
    if changed and run.files.is_done("dense"):
        _check_answers(run, " and ".join(changed))
    return changed


def _check_answers(run: Run, changed: str) -> None:
    before = torch.tensor(run.files.result("dense", DenseResult).answers)
    try:
        now = torch.tensor(dense_answers(run))
        reason = "the dense model answers otherwise than it did"
    except FileError as error:
        now, reason = before[:0], str(error)
    scale = before.abs().max() if len(before) else torch.tensor(0.0)
    if before.shape != now.shape or not bool((before - now).abs().max() <= _TOLERANCE * scale):
        raise FileError(
            f"model.factory {run.recipe.model.factory}: the code of {changed} has changed since the run in "
            f"{run.files.path} began, and it is another model now: {reason}. Put the code back, or start in another "
            "--output"
        )
