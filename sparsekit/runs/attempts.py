"""The fastest model within a budget of validation accuracy, found by attempts at several speed-ups.

Each attempt is a run of its own below attempts/, from the same dense model. Its recipe asks for a speed-up instead of
`max_accuracy_drop`. The attempt that is taken is copied into the run, which goes on with it as if there had been no
other. Attempts see no test image; the one that is taken is tested afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from sparsekit.artifact.format import read_structure
from sparsekit.errors import InputError
from sparsekit.files import atomic_path, write_text
from sparsekit.recipe.reading import dump_recipe
from sparsekit.recipe.specs import TargetSpec
from sparsekit.runs import prune_stages
from sparsekit.runs.accuracy_search import bracket, full_target, largest_factor, next_pressure, target_at
from sparsekit.runs.arguments import Target
from sparsekit.runs.choosing import check_speed
from sparsekit.runs.results import Attempt, AttemptFinetuned, AttemptsResult, CutResult, SparsifyResult
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.runs.stages import Stage, artifact, run_stage
from sparsekit.structure.counting import count_macs
from sparsekit.structure.plan import PrunePlan


def make_attempts(run: Run, tick: Callable[[], None]) -> AttemptsResult:
    """Make attempts until they are used up or another one would tell nothing new, and choose which one to take.

    The journal has the result of every attempt, so that a resumed run goes on with the next. Raises InputError if no
    attempt could be made.
    """
    budget = _budget(run.arguments.target)
    noted = run.files.has_result("attempts")
    found = run.files.result("attempts", AttemptsResult) if noted else _first_result(run)
    while len(found.attempts) < run.recipe.cut.attempts:
        pressure = next_pressure(_tried(found.attempts), budget, found.most, largest_factor(found.full))
        if pressure is None:
            break
        made_now = _attempt(run, tick, len(found.attempts) + 1, pressure, found)
        found = replace(found, attempts=(*found.attempts, made_now))
        run.files.note("attempts", found)
    made = [one for one in found.attempts if one.accuracy is not None]
    if not made:
        raise InputError(
            f"none of {len(found.attempts)} attempts could be made: {found.attempts[-1].failure}"
        )
    taken = max(
        (one for one in made if one.accepted),
        key=lambda one: one.pressure,
        default=min(made, key=lambda one: one.drop),
    )
    run.say(f"attempts: {taken.number} is taken")
    remark = "" if taken.accepted else _nothing_accepted(run.arguments.target, taken, len(found.attempts))
    return replace(
        found, taken=taken.number, binds=_binding(run.arguments.target, taken, found), remark=remark
    )


def take_sparsified(run: Run, tick: Callable[[], None]) -> SparsifyResult:
    """Copy the sparse model of the attempt that is taken, and return its result."""
    _copy_from_taken(run, "checkpoints/sparse.safetensors")
    return _taken(run).result("sparsify", SparsifyResult)


def take_cut(run: Run, tick: Callable[[], None]) -> CutResult:
    """Copy the cut model of the attempt that is taken, and return its result."""
    _copy_from_taken(run, "checkpoints/cut")
    return _taken(run).result("cut", CutResult)


def take_finetuned(run: Run, tick: Callable[[], None]) -> tuple[nn.Module, PrunePlan]:
    """Return the fine-tuned model of the attempt that is taken, on the device, and the plan it was cut by."""
    for row in _taken(run).metrics:
        run.files.add_metrics(row)
    folder = _taken(run).path / "pruned"
    plan = PrunePlan.from_json(read_structure(folder)["plan"])
    return run.load_artifact(folder).to(run.accelerator.device), plan


def _budget(target: Target) -> float:
    # Rounding must not refuse a drop of exactly the budget.
    return (target.max_accuracy_drop or 0.0) + 1e-9


def _first_result(run: Run) -> AttemptsResult:
    full, most = full_target(run.arguments.target, *check_speed(run))
    dense = run.evaluate(run.final_dense(), run.images("validation"))
    run.say(f"attempts: the dense model has a validation {run.measure} of {dense:.4f}")
    return AttemptsResult(full, most, dense)


def _tried(attempts: Sequence[Attempt]) -> list[tuple[float, float]]:
    return [(one.pressure, one.drop) for one in attempts]


def _attempt(
    run: Run, tick: Callable[[], None], number: int, pressure: float, found: AttemptsResult
) -> Attempt:
    """Prune to the target at this pressure in a run directory of its own, and judge the result."""
    target = run.arguments.target.besides_accuracy if pressure == 1 else {}
    target = target or target_at(found.full, pressure)
    asked = ", ".join(f"{key} {value:g}" for key, value in target.items())
    run.say(f"attempts: {number}, {asked}")
    inner = _inner_run(run, number, TargetSpec(**target))
    try:
        for stage in _STAGES:
            run_stage(inner, stage, also=tick)
    except InputError as error:  # the speed-up is out of reach, or so low that nothing can go
        run.say(f"attempts: {number}, {asked}: {error}")
        drop = 0.0 if isinstance(error, prune_stages.NothingToCutError) else 1.0
        return Attempt(number, pressure, target, drop, failure=str(error))
    choice = inner.files.result("cut", CutResult).choice
    tuned = inner.files.result("finetune", AttemptFinetuned)
    drop = found.dense_accuracy - tuned.validation_accuracy
    accepted = drop <= _budget(run.arguments.target)
    run.say(
        f"attempts: {number}, {asked}: validation {run.measure} {tuned.validation_accuracy:.4f}, {drop:.4f} lower than "
        f"dense: {'within the budget' if accepted else 'too much'}"
    )
    measured = choice.found.measured if choice is not None and choice.found is not None else None
    return Attempt(number, pressure, target, drop, accepted, measured, tuned.macs, tuned.validation_accuracy)


def _inner_run(run: Run, number: int, target: TargetSpec) -> Run:
    """Open the run of an attempt, in a directory that is new or was begun before."""
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


def _attempt_folder(run: Run, number: int) -> Path:
    """Name the run directory of an attempt."""
    return run.files.path / "attempts" / str(number)


def _finetune(run: Run, tick: Callable[[], None]) -> AttemptFinetuned:
    """Fine-tune an attempt and evaluate it on the validation images."""
    model, plan = prune_stages.finetune(run, tick)
    accuracy = run.evaluate(model, run.images("validation"))
    run.save_artifact(model, run.files.path / "pruned", plan, run.describe(validation_accuracy=accuracy))
    return AttemptFinetuned(accuracy, count_macs(model, run.example))


_STAGES = (
    Stage(
        "sparsify",
        prune_stages.sparsify,
        ("training", "sparsify", "cut"),
        ("checkpoints/sparse.safetensors",),
    ),
    Stage("cut", prune_stages.cut, ("cut",), artifact("checkpoints/cut")),
    Stage("finetune", _finetune, ("training", "finetune"), artifact("pruned")),
)


def _nothing_accepted(target: Target, taken: Attempt, count: int) -> str:
    asked = ", ".join(f"{key} {value:g}" for key, value in taken.target.items())
    return (
        f"none of {count} attempts stayed within {target.max_accuracy_drop:g} of the dense model's validation "
        f"accuracy; the nearest lost {taken.drop:.4f} ({asked})"
    )


def _binding(target: Target, taken: Attempt, found: AttemptsResult) -> str:
    """Name the keys of the recipe that kept the model from being pruned further."""
    budget, tried = _budget(target), _tried(found.attempts)
    more = next_pressure(tried, budget, found.most, largest_factor(found.full)) is not None
    _, beyond = bracket(tried, budget)
    if beyond is not None and any(one.failure for one in found.attempts if one.pressure == beyond[0]):
        keys = ["cut.min_channels"]
    elif beyond is not None:
        keys = ["cut.target.max_accuracy_drop"]
    elif taken.pressure >= found.most:
        keys = [f"cut.target.{key}" for key in target.besides_accuracy] or ["cut.min_channels"]
    else:
        keys = []
    return " and ".join([*keys, *(["cut.attempts"] if more else [])])


def _copy_from_taken(run: Run, leaf: str) -> None:
    """Copy a file or folder of the attempt that is taken into the run."""
    taken = _taken(run)
    source = taken.path / leaf
    if run.files.writes:
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            with atomic_path(run.files.path / file.relative_to(taken.path)) as temporary:
                shutil.copyfile(file, temporary)
    run.accelerator.wait_for_everyone()


def _taken(run: Run) -> RunDirectory:
    number = run.files.result("attempts", AttemptsResult).taken
    files = RunDirectory(_attempt_folder(run, number), writes=False)
    files.open(resume=True)
    return files
