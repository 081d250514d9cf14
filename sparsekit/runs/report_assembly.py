"""The report of a finished run, put together from its directory: journal, metrics and recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekit.errors import FileError
from sparsekit.latency.search import SPEED_TOLERANCE
from sparsekit.recipe.reading import load_recipe
from sparsekit.recipe.recipe import Recipe
from sparsekit.report.page import write_html
from sparsekit.report.schema import RunReport, write_json
from sparsekit.runs.arguments import wants_attempts
from sparsekit.runs.run_directory import RunDirectory


def final_accuracies(files: RunDirectory) -> dict[str, float]:
    dense = "baseline" if "baseline" in files.stages else "dense"
    return {"dense": files.result(dense)["accuracy"], "pruned": files.result("finetune")["accuracy"]}


def build_report(directory: Path) -> RunReport:
    """The report of the finished run in `directory`, from its journal, metrics and recipe.

    Raises FileError if it holds no run or one whose stages up to the benchmark are not all done.
    """
    files = RunDirectory(directory, writes=False)
    files.open(resume=True)
    if not (directory / "recipe.yaml").exists():
        raise FileError(
            f"the run in {directory} is incomplete: it has no recipe.yaml; copy the whole directory"
        )
    recipe = load_recipe(directory / "recipe.yaml")
    if "dense" not in files.stages and files.is_done("sparsify"):
        raise FileError(
            f"{directory} holds an attempt on the way to a budget of accuracy, not a run; its figures are in the "
            "report of the run that it was made for"
        )
    needed = ("dense", "sparsify", "cut", "finetune", "export", "benchmark")
    open_stages = [name for name in needed if name not in files.stages or files.stages[name].status != "done"]
    if open_stages:
        raise FileError(
            f"the run in {directory} is not finished (open: {', '.join(open_stages)}); go on with --resume"
        )
    try:
        return _assemble(directory, files, recipe)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FileError(
            f"the journal or the metrics of the run in {directory} are damaged: {error}"
        ) from error


def _assemble(directory: Path, files: RunDirectory, recipe: Recipe) -> RunReport:
    dense, cut, finetune = files.result("dense"), files.result("cut"), files.result("finetune")
    exported, bench = files.result("export"), files.result("benchmark")
    latency = bench["latency"]
    with_baseline = "baseline" in files.stages
    dense_figures = files.result("baseline") if with_baseline else dense
    config = dense["config"]
    return RunReport.model_validate(
        {
            "recipe": directory.name if recipe.output is None else recipe.output.name,
            "model": {"name": recipe.model.name, "args": dict(recipe.model.args)},
            "data": dense["data"],
            "input_shape": config["input_size"],
            **{key: config[key] for key in ("mean", "std", "interpolation", "crop_pct")},
            "dense": _figures(dense_figures, exported["dense"], latency["latencies"][0]),
            "pruned": _figures(finetune, exported["pruned"], latency["latencies"][1]),
            "sparse": {
                key: cut[key]
                for key in (
                    *("accuracy_before_cut", "accuracy_after_cut", "max_abs_logit_change", "max_abs_logit"),
                    *("near_zero_channels", "channels"),
                )
            },
            "speedup": latency["speedups"][0],
            "null": latency["null"],
            "parity": exported["pruned"]["parity"],
            "dense_parity": exported["dense"]["parity"],
            "benchmark": {
                key: latency[key] for key in ("batch", "threads", "rounds", "trustworthy", "reason")
            },
            "round_trip_max_abs": finetune["round_trip_max_abs"],
            "machine": bench["machine"],
            "seed": recipe.seed,
            "versions": bench["versions"],
            "epochs": {
                "dense": recipe.dense.epochs,
                "baseline": recipe.sparsify.epochs + recipe.finetune.epochs if with_baseline else 0,
                "sparsify": recipe.sparsify.epochs,
                "finetune": recipe.finetune.epochs,
            },
            "stages": [
                {"name": stage.name, "seconds": stage.seconds, "status": stage.status}
                for stage in files.stages.values()
                if stage.name != "report"
            ],
            "layers": cut["layers"],
            "variants": [
                {
                    **variant,
                    "latency_ms": _latency_figures(measured),
                    "speedup": speedup,
                }
                for variant, measured, speedup in zip(
                    exported.get("variants", ()),
                    latency["latencies"][2:],
                    latency["speedups"][1:],
                    strict=True,
                )
            ],
            **(_attempts(files) if wants_attempts(recipe) else {}),
            "dense_graph": exported["dense"].get("graph"),
            "pruned_graph": exported["pruned"].get("graph"),
            "asked": {} if recipe.cut.target is None else recipe.cut.target.model_dump(exclude_none=True),
            "curves": files.metrics,
            "warnings": _warnings(recipe, files),
        }
    )


def _attempts(files: RunDirectory) -> dict[str, Any]:
    if not files.is_done("attempts"):
        return {}
    notes = files.result("attempts")
    attempts = [
        {key: value for key, value in one.items() if key != "pressure"}
        | {"taken": one["number"] == notes["taken"]}
        for one in notes["attempts"]
    ]
    return {"attempts": attempts, "binds": notes["binds"]}


def _figures(
    trained: Mapping[str, Any], exported: Mapping[str, Any], latency: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **{key: trained[key] for key in ("accuracy", "params", "macs")},
        **{key: exported[key] for key in ("onnx_bytes", "accuracy_onnx")},
        "latency_ms": _latency_figures(latency),
    }


def _latency_figures(latency: Mapping[str, Any]) -> dict[str, float]:
    return {"median": latency["median_ms"], "p10": latency["p10_ms"], "p90": latency["p90_ms"]}


def _warnings(recipe: Recipe, files: RunDirectory) -> list[str]:
    """What a reader should know before trusting the figures."""
    found: list[str] = []
    cut = files.result("cut")
    choice, subject, asked = cut.get("choice", {}), "The target was not met as asked", "Asked"
    if wants_attempts(recipe):
        found += _accuracy_warnings(recipe, files)
        subject, asked = (
            "The attempt that was taken did not meet its target",
            "The attempt that was taken asked",
        )
    shortfall = files.result("sparsify").get("shortfall")  # runs of before it was noted have none
    if shortfall:
        found.append(f"The penalty fell short of its target: {shortfall}.")
    if choice.get("remark"):
        found.append(f"{subject}: {choice['remark']}.")
    elif missed := _missed_speed(asked, choice, files.result("benchmark")["latency"]):
        found.append(missed)
    if cut["removed_live"]:
        found.append(
            f"{cut['removed_live']} of the {cut['removed']} channels removed were not zero: the cut was not lossless."
        )
    elif cut["max_abs_logit_change"] > 1e-4 * cut["max_abs_logit"]:
        found.append(
            "The cut changed the logits although every channel removed was zero: an activation turns zero into a "
            "constant, which a padded convolution does not read as one."
        )
    graphs = [files.result("export")[name].get("graph") for name in ("dense", "pruned")]
    if all(graphs) and graphs[1]["plain"] > graphs[0]["plain"]:
        found.append(
            f"The cut pushed {graphs[1]['plain'] - graphs[0]['plain']} convolutions out of ONNX Runtime's blocked "
            "layout, and outside they are slow: channels that are no multiple of 4, or narrow groups of a number that "
            "cannot be merged; set cut.round_to: auto."
        )
    if files.result("dense")["data"]["test"] < 1000:
        n = files.result("dense")["data"]["test"]
        found.append(f"The test set has {n} images: one image is {1 / n:.4f} of accuracy.")
    return found


def _accuracy_warnings(recipe: Recipe, files: RunDirectory) -> Iterator[str]:
    """What to know of a budget of accuracy: that it was not met, or is finer than the validation images can tell."""
    notes, n = files.result("attempts"), files.result("dense")["data"]["validation"]
    if notes["remark"]:
        yield f"The target was not met as asked: {notes['remark']}."
    assert recipe.cut.target is not None
    budget, accuracy = recipe.cut.target.max_accuracy_drop or 0.0, notes["dense_accuracy"]
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    if budget < error:
        yield (
            f"The validation set has {n} images: its accuracy is known to {error:.4f} (standard error), and "
            f"max_accuracy_drop is {budget:g}. Which attempts are within the budget is partly chance."
        )


def _missed_speed(asked: str, choice: Mapping[str, Any], latency: Mapping[str, Any]) -> str:
    """What to say if the last measurement is further from the speed asked for than the choice of channels was."""
    measured = latency["speedups"][0]["value"]
    if "asked" not in choice or abs(measured / choice["asked"] - 1) <= SPEED_TOLERANCE:
        return ""
    return (
        f"{asked} for a speed-up of {choice['asked']:.3g}, the benchmark measured {measured:.3g}. When the channels "
        f"were chosen, {choice['found']['measured']:.3g} was measured for them: so far apart are two measurements on "
        "this machine."
    )


def write_report(directory: Path) -> RunReport:
    report = build_report(directory)
    write_json(report, directory / "report.json")
    write_html(report, directory / "report.html")
    return report
