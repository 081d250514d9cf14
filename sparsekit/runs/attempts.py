"""The fastest model within a budget of validation accuracy: pruned at one speed after the other, each trained whole.

Each attempt is a run of its own below attempts/, from the same dense model; its recipe asks for a speed where the
run's own asks for `max_accuracy_drop`. The one that is taken is copied into the run, which then goes on with it as if
there had been no other. No attempt but that one sees a test image, and only then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsekit.artifact.format import read_structure
from sparsekit.artifact.load import load as load_artifact
from sparsekit.errors import InputError
from sparsekit.files import atomic_path, write_text
from sparsekit.recipe.reading import dump_recipe
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import TargetSpec
from sparsekit.runs import prune_stages
from sparsekit.runs.accuracy_search import (
    bracket,
    full_target,
    largest_factor,
    next_pressure,
    other_targets,
    required_target,
    target_at,
)
from sparsekit.runs.arguments import wants_attempts
from sparsekit.runs.choosing import check_speed
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.runs.stages import Stage, run_stage
from sparsekit.structure.counting import count_macs
from sparsekit.structure.plan import PrunePlan


@dataclass(frozen=True)
class Attempt:
    """What was asked of it and how it ended.

    `pressure` is what its target is raised to (`target_at`). `accuracy` is that of validation images, `drop` how much
    lower than the dense model's; `speedup` is what was measured when channels were chosen, None where no speed was
    asked for. What could not be made has no figures, and says why not in `failure`; its `drop` is 0 where there was
    nothing to cut, else 1.
    """

    number: int
    pressure: float
    target: dict[str, float]
    drop: float
    accepted: bool = False
    speedup: float | None = None
    macs: int | None = None
    accuracy: float | None = None
    failure: str = ""


def make_attempts(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Try pressures until the attempts are used up or none is worth it; says which one to take, and why.

    What is found is in the journal after every attempt, so that a resumed run goes on with the next. Raises InputError
    if no attempt could be made.
    """
    budget = _budget(run.recipe)
    notes = run.files.result("attempts") or _first_notes(run)
    attempts = [Attempt(**plain) for plain in notes["attempts"]]
    while len(attempts) < run.recipe.cut.attempts:
        pressure = next_pressure(_tried(attempts), budget, notes["most"], largest_factor(notes["full"]))
        if pressure is None:
            break
        attempts.append(_attempt(run, tick, len(attempts) + 1, pressure, notes))
        notes["attempts"] = [asdict(one) for one in attempts]
        run.files.note("attempts", notes)
    made = [one for one in attempts if one.accuracy is not None]
    if not made:
        raise InputError(f"none of {len(attempts)} attempts could be made: {attempts[-1].failure}")
    taken = max(
        (one for one in made if one.accepted),
        key=lambda one: one.pressure,
        default=min(made, key=lambda one: one.drop),
    )
    run.say(f"attempts: {taken.number} is taken")
    return notes | {
        "taken": taken.number,
        "binds": _binding(run.recipe, taken, attempts, notes),
        "remark": "" if taken.accepted else _nothing_accepted(run.recipe, taken, len(attempts)),
    }


def _first_notes(run: Run) -> dict[str, Any]:
    full, most = full_target(run.recipe, *check_speed(run))
    dense = run.evaluate(run.final_dense(), run.inputs.data.validation)
    run.say(f"attempts: the dense model gets {dense:.4f} of the validation images right")
    return {"full": full, "most": most, "dense_accuracy": dense, "attempts": []}


def _tried(attempts: Sequence[Attempt]) -> list[tuple[float, float]]:
    return [(one.pressure, one.drop) for one in attempts]


def _budget(recipe: Recipe) -> float:
    # As many images as are allowed are not one too many.
    return (required_target(recipe).max_accuracy_drop or 0.0) + 1e-9


def _attempt_folder(run: Run, number: int) -> Path:
    """The run directory of an attempt."""
    return run.files.path / "attempts" / str(number)


def _attempt(
    run: Run, tick: Callable[[], None], number: int, pressure: float, notes: Mapping[str, Any]
) -> Attempt:
    """Prune to the target at this pressure, in a run directory of its own."""
    target = other_targets(run.recipe) if pressure == 1 else {}
    target = target or target_at(notes["full"], pressure)
    asked = ", ".join(f"{key} {value:g}" for key, value in target.items())
    run.say(f"attempts: {number}, {asked}")
    inner = _inner_run(run, number, TargetSpec(**target))
    try:
        for stage in _STAGES:
            run_stage(inner, stage, also=tick)
    except InputError as error:  # a speed that turns out to be out of reach, or so low that nothing can go
        run.say(f"attempts: {number}, {asked}: {error}")
        drop = 0.0 if isinstance(error, prune_stages.NothingToCutError) else 1.0
        return Attempt(number, pressure, target, drop, failure=str(error))
    choice, figures = inner.files.result("cut")["choice"], inner.files.result("finetune")
    accuracy = figures["validation_accuracy"]
    drop = notes["dense_accuracy"] - accuracy
    accepted = drop <= _budget(run.recipe)
    run.say(
        f"attempts: {number}, {asked}: {accuracy:.4f} of the validation images, {drop:.4f} lower than dense: "
        f"{'within the budget' if accepted else 'too much'}"
    )
    measured = choice["found"]["measured"] if "found" in choice else None
    return Attempt(number, pressure, target, drop, accepted, measured, figures["macs"], accuracy)


def _inner_run(run: Run, number: int, target: TargetSpec) -> Run:
    """The run of an attempt, in a directory that is new or was begun before."""
    cut = run.recipe.cut.model_copy(update={"target": target})
    files = RunDirectory(_attempt_folder(run, number), writes=run.files.writes)
    with run.accelerator.main_process_first():
        if files.writes and not files.exists:  # killed while the directory was made
            shutil.rmtree(files.path, ignore_errors=True)
        files.open(resume=files.exists)
    inner = replace(
        run,
        recipe=run.recipe.model_copy(update={"cut": cut, "output": None}),
        files=files,
        origin=run.files,
    )
    if files.writes:
        write_text(files.path / "recipe.yaml", dump_recipe(inner.recipe))
    return inner


def _finetune(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Fine-tune an attempt, and judge it by validation images."""
    model, plan = prune_stages.finetune(run, tick)
    accuracy = run.evaluate(model, run.inputs.data.validation)
    run.save_artifact(model, run.files.path / "pruned", plan, run.describe(validation_accuracy=accuracy))
    return {"validation_accuracy": accuracy, "macs": count_macs(model, run.example)}


_STAGES = (
    Stage(
        "sparsify",
        prune_stages.sparsify,
        ("training", "sparsify", "cut"),
        ("checkpoints/sparse.safetensors",),
    ),
    Stage("cut", prune_stages.cut, ("cut",), ("checkpoints/cut/model.safetensors",)),
    Stage("finetune", _finetune, ("training", "finetune"), ("pruned/model.safetensors",)),
)


def _binding(recipe: Recipe, taken: Attempt, attempts: Sequence[Attempt], notes: Mapping[str, Any]) -> str:
    """What kept the model from being pruned further: keys of the recipe."""
    budget, full = _budget(recipe), largest_factor(notes["full"])
    more = next_pressure(_tried(attempts), budget, notes["most"], full) is not None
    _, beyond = bracket(_tried(attempts), budget)
    if beyond is not None and any(one.failure for one in attempts if one.pressure == beyond[0]):
        keys = ["cut.min_channels"]
    elif beyond is not None:
        keys = ["cut.target.max_accuracy_drop"]
    elif taken.pressure >= notes["most"]:
        keys = [f"cut.target.{key}" for key in other_targets(recipe)] or ["cut.min_channels"]
    else:
        keys = []
    return " and ".join([*keys, *(["cut.attempts"] if more else [])])


def _nothing_accepted(recipe: Recipe, taken: Attempt, count: int) -> str:
    asked = ", ".join(f"{key} {value:g}" for key, value in taken.target.items())
    return (
        f"none of {count} attempts stayed within {required_target(recipe).max_accuracy_drop:g} of the dense model's "
        f"validation accuracy; the nearest lost {taken.drop:.4f} ({asked})"
    )


def take_sparsified(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """The sparse model of the attempt that is taken."""
    return _take(run, "sparsify", "checkpoints/sparse.safetensors")


def take_cut(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """The cut model of the attempt that is taken."""
    return _take(run, "cut", "checkpoints/cut")


def take_finetuned(run: Run) -> tuple[nn.Module, PrunePlan]:
    """The finished model of the attempt that is taken, on the device, and the plan it was cut by."""
    for row in _taken(run).metrics:
        run.files.add_metrics(row)
    folder = _taken(run).path / "pruned"
    plan = PrunePlan.from_json(read_structure(folder)["plan"])
    return load_artifact(folder).to(run.accelerator.device), plan


def _taken(run: Run) -> RunDirectory:
    assert wants_attempts(run.recipe)
    files = RunDirectory(_attempt_folder(run, run.files.result("attempts")["taken"]), writes=False)
    files.open(resume=True)
    return files


def _take(run: Run, stage: str, leaf: str) -> dict[str, Any]:
    """Copy what a stage of the attempt left into the run; returns what the stage found."""
    taken = _taken(run)
    source = taken.path / leaf
    if run.files.writes:
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            with atomic_path(run.files.path / file.relative_to(taken.path)) as temporary:
                shutil.copyfile(file, temporary)
    run.accelerator.wait_for_everyone()
    return taken.result(stage)
