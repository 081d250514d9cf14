"""The fastest model within a budget of validation accuracy: pruned at one speed after the other, each trained whole.

Each attempt is a run of its own below attempts/, from the same dense model; its recipe asks for a speed where the
run's own asks for `max_accuracy_drop`. The one that is taken is copied into the run, which then goes on with it as if
there had been no other. Only then are test images looked at.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsekit import artifact, pruning
from sparsekit.complexity import count_macs
from sparsekit.errors import InputError
from sparsekit.files import atomic_path, write_text
from sparsekit.inputs import wants_attempts
from sparsekit.plan import PrunePlan
from sparsekit.recipe import Recipe, TargetSpec, dump_recipe
from sparsekit.run import Run
from sparsekit.run_directory import RunDirectory
from sparsekit.stages import Stage, run_stage
from sparsekit.targets import reachable_speed

# What is tried first where nothing but the accuracy is asked for.
_FIRST_SPEEDUP = 2.0
# Between two attempts this much of a pressure is no difference worth training for: 2 to this power is 1.11.
_NEAREST = 0.15
_FASTER = math.log2(1.5)
# A speed near the limit of what is predicted to be possible might turn out not to be.
_SAFE = 0.9


@dataclass(frozen=True)
class Attempt:
    """What was asked of it and how it ended.

    `pressure` is what its target is raised to (`target_at`). `accuracy` is that of validation images, `drop` how much
    lower than the dense model's; `speedup` is what was measured when channels were chosen, None where no speed was
    asked for.
    """

    number: int
    pressure: float
    target: dict[str, float]
    speedup: float | None
    macs: int
    accuracy: float
    drop: float
    accepted: bool


def target_at(base: Mapping[str, float], pressure: float) -> dict[str, float]:
    """A target between nothing (pressure 0) and `base` (1), or beyond: a speed-up and shares, raised to the pressure.

    Rounded to four significant digits.
    """
    return {key: float(f"{value**pressure:.4g}") for key, value in base.items()}


def next_pressure(tried: Sequence[tuple[float, float]], budget: float, most: float) -> float | None:
    """The pressure to try after `tried` pairs of pressure and drop, up to `most`; None if no other is worth it.

    First 1; then half as fast again as long as the drop stays within the budget; then between the largest within it and
    the smallest beyond, nearer to the one whose drop is nearer to the budget (regula falsi, kept off the ends).
    """
    within = max(((x, drop) for x, drop in tried if drop <= budget), default=(0.0, 0.0))
    beyond = min(((x, drop) for x, drop in tried if drop > budget), default=None)
    if not tried:
        return min(1.0, most)
    if beyond is None:
        faster = min(within[0] + _FASTER, most)
        return faster if faster > within[0] else None
    (low, low_drop), (high, high_drop) = within, beyond
    if high - low <= _NEAREST:
        return None
    share = (budget - low_drop) / (high_drop - low_drop)
    return low + max(min(max(share, 0.3), 0.7) * (high - low), min(_NEAREST, (high - low) / 2))


def make_attempts(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Try pressures until the attempts are used up or none is worth it; says which one to take, and why.

    What is found is in the journal after every attempt, so that a resumed run goes on with the next.
    """
    notes = run.files.result("attempts")
    if not notes:
        base, most = _base(run)
        dense = run.evaluate(run.final_dense(), run.inputs.data.validation)
        notes |= {"base": base, "most": most, "dense_accuracy": dense, "attempts": []}
        run.say(f"attempts: the dense model gets {dense:.4f} of the validation images right")
        tick()
    attempts = [Attempt(**plain) for plain in notes["attempts"]]
    budget = _budget(run.recipe)
    while len(attempts) < run.recipe.cut.attempts:
        tried = [(one.pressure, one.drop) for one in attempts]
        pressure = next_pressure(tried, budget, notes["most"])
        if pressure is None:
            break
        attempts.append(_attempt(run, len(attempts) + 1, pressure, notes))
        notes["attempts"] = [asdict(one) for one in attempts]
        tick()
    taken = max(
        (one for one in attempts if one.accepted),
        key=lambda one: one.pressure,
        default=min(attempts, key=lambda one: one.drop),
    )
    run.say(f"attempts: {taken.number} is taken")
    return notes | {
        "taken": taken.number,
        "binds": _binding(run.recipe, taken, attempts, notes["most"]),
        "remark": "" if taken.accepted else _nothing_accepted(taken, budget),
    }


def _budget(recipe: Recipe) -> float:
    target = recipe.cut.target
    assert target is not None
    assert target.max_accuracy_drop is not None
    return target.max_accuracy_drop + 1e-9  # as many images as were allowed are not one too many


def _others(recipe: Recipe) -> dict[str, float]:
    """What the target asks for besides the accuracy."""
    assert recipe.cut.target is not None
    return recipe.cut.target.model_dump(exclude_none=True, exclude={"max_accuracy_drop"})


def _base(run: Run) -> tuple[dict[str, float], float]:
    """The target that pressure 1 stands for, with any latency as a speed-up, and the highest pressure to try."""
    base = _others(run.recipe)
    dense_ms, most = reachable_speed(run)
    if "latency_ms" in base:
        base["speedup"] = dense_ms / base.pop("latency_ms")
    if base:
        return base, 1.0
    if _SAFE * most < 2**_NEAREST:
        raise InputError(
            f"cut.target.max_accuracy_drop: with the fewest channels allowed the model is predicted to be {most:.3g} "
            "times as fast, which is not worth a search; lower cut.min_channels, or free more with "
            "cut.through_layer_norm or cut.blocks"
        )
    return {"speedup": _FIRST_SPEEDUP}, math.log(_SAFE * most, _FIRST_SPEEDUP)


def _attempt(run: Run, number: int, pressure: float, notes: Mapping[str, Any]) -> Attempt:
    """Prune to the target at this pressure, in a run directory of its own."""
    target = target_at(notes["base"], pressure)
    asked = ", ".join(f"{key} {value:g}" for key, value in target.items())
    run.say(f"attempts: {number}, {asked}")
    cut = run.recipe.cut.model_copy(update={"target": TargetSpec(**target)})
    files = RunDirectory(attempt_folder(run, number), writes=run.files.writes)
    with run.accelerator.main_process_first():
        files.open(resume=files.exists)
    inner = replace(
        run, recipe=run.recipe.model_copy(update={"cut": cut, "output": None}), files=files, origin=run.files
    )
    if files.writes:
        write_text(files.path / "recipe.yaml", dump_recipe(inner.recipe))
    for stage in _STAGES:
        run_stage(inner, stage)
    measured = (files.result("cut")["choice"] or {}).get("found")
    figures = files.result("finetune")
    drop = notes["dense_accuracy"] - figures["validation_accuracy"]
    accepted = drop <= _budget(run.recipe)
    run.say(
        f"attempts: {number}, {asked}: {figures['validation_accuracy']:.4f} of the validation images, {drop:.4f} lower "
        f"than dense: {'within the budget' if accepted else 'too much'}"
    )
    return Attempt(
        number,
        pressure,
        target,
        measured and measured["measured"],
        figures["macs"],
        figures["validation_accuracy"],
        drop,
        accepted,
    )


def attempt_folder(run: Run, number: int) -> Path:
    """The run directory of an attempt."""
    return run.files.path / "attempts" / str(number)


def _finetune(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Fine-tune an attempt, and judge it by validation images."""
    model, plan = pruning.finetune(run, tick)
    accuracy = run.evaluate(model, run.inputs.data.validation)
    run.save_artifact(model, run.files.path / "pruned", plan, run.describe(validation_accuracy=accuracy))
    return {"validation_accuracy": accuracy, "macs": count_macs(model, run.example)}


_STAGES = (
    Stage("sparsify", pruning.sparsify, ("training", "sparsify", "cut"), ("checkpoints/sparse.safetensors",)),
    Stage("cut", pruning.cut, ("cut",), ("checkpoints/cut/model.safetensors",)),
    Stage("finetune", _finetune, ("training", "finetune"), ("pruned/model.safetensors",)),
)


def _binding(recipe: Recipe, taken: Attempt, attempts: Sequence[Attempt], most: float) -> str:
    """What kept the model from being pruned further: keys of the recipe."""
    if any(one.pressure > taken.pressure for one in attempts) or not taken.accepted:
        return "cut.target.max_accuracy_drop"
    if taken.pressure < most:
        return "cut.attempts"
    return " and ".join(f"cut.target.{key}" for key in _others(recipe)) or "cut.min_channels"


def _nothing_accepted(taken: Attempt, budget: float) -> str:
    return (
        f"no attempt stayed within {budget:.3g} of the dense model's validation accuracy; the nearest lost "
        f"{taken.drop:.4f} ({', '.join(f'{key} {value:g}' for key, value in taken.target.items())})"
    )


# ------------------------------------------------------------------------------- going on with the attempt taken


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
    plan = PrunePlan.from_json(artifact.read_structure(folder)["plan"])
    return artifact.load(folder).to(run.accelerator.device), plan


def _taken(run: Run) -> RunDirectory:
    assert wants_attempts(run.recipe)
    files = RunDirectory(attempt_folder(run, run.files.result("attempts")["taken"]), writes=False)
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
