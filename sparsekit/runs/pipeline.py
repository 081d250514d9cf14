"""The story of a run, one stage after the other.

    dense -> baseline -> sparsify -> cut -> finetune -> export -> benchmark -> report

The baseline is what the pruned model is compared with, and what it learns from where it learns from a dense model.
Where the target is a budget of accuracy, attempts at several speeds follow it; the stages sparsify, cut and finetune
then take over the one that stays within the budget.

Every stage is journaled in the run directory: done stages are skipped on resume, a training stage goes on after
its last completed epoch. Stages hand over through files (weights, artifacts, ONNX) and small results in the
journal, so that a resumed run and an uninterrupted one read the same things.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from sparsekit.artifact.load import check_round_trip
from sparsekit.artifact.load import load as load_artifact
from sparsekit.errors import VerificationError
from sparsekit.evaluation import comparing
from sparsekit.export.graph_summary import take_census
from sparsekit.export.onnx_file import export_onnx, metadata_texts, read_metadata
from sparsekit.export.parity import check_parity, onnx_accuracy
from sparsekit.export.precision import convert_to_fp16, quantize_to_int8
from sparsekit.files import write_text
from sparsekit.latency.compare import compare_latency
from sparsekit.machine import describe_machine, library_versions
from sparsekit.options import Precision
from sparsekit.recipe.reading import dump_recipe
from sparsekit.recipe.recipe import Recipe
from sparsekit.report.schema import RunReport
from sparsekit.runs import attempts, prune_stages
from sparsekit.runs.accuracy_search import full_target
from sparsekit.runs.arguments import (
    build_model,
    make_accelerator,
    wants_attempts,
    wants_baseline,
    wants_speed,
)
from sparsekit.runs.choosing import check_speed
from sparsekit.runs.rehearsal import open_inputs
from sparsekit.runs.report_assembly import build_report, final_accuracies, write_report
from sparsekit.runs.run import Run
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.runs.stages import Stage, run_stage
from sparsekit.structure.counting import count_macs, count_params

# Float32 kernels that add in another order differ by 1e-6; ten times worse than any seen is a wrong graph.
_PARITY_LIMIT = 1e-3


# -------------------------------------------------------------------------------------------------- the story


def prune(recipe: Recipe, *, output: Path, resume: bool, console: Console) -> RunReport:
    """Run a recipe in the directory `output` and return its report.

    Raises InputError (all problems of the recipe's model and data in one message), FileError (the directory
    holds a run already, or none to resume), TrainingError (the loss is not finite), VerificationError (a proof
    failed).
    """
    inputs = open_inputs(recipe)
    accelerator = make_accelerator(recipe)
    files = RunDirectory(output, writes=accelerator.is_main_process)
    with accelerator.main_process_first():  # the others find the directory that the main process opened
        files.open(resume=resume or not files.writes)
    run = Run(recipe, inputs, files, accelerator, console)
    story = _story(recipe)
    for stage in story:  # all of them before anything is written: a refused resume leaves the run as it was
        files.check_settings(stage.name, stage.settings(run))
    if files.writes:
        write_text(output / "recipe.yaml", dump_recipe(recipe))
    if (wants_speed(recipe) or wants_attempts(recipe)) and not files.is_done("cut"):
        dense_ms, most = check_speed(run)
        if wants_attempts(recipe) and not files.is_done("attempts"):
            full_target(recipe, dense_ms, most)  # refuses what is not worth a search
    for stage in story:
        run_stage(run, stage)
    return build_report(output)


# ----------------------------------------------------------------------------------------------- the stages


def _story(recipe: Recipe) -> list[Stage]:
    weights, pruned = "checkpoints/{}.safetensors".format, "{}/model.safetensors".format
    lengths = [
        f"{phase}.{key}"
        for phase in ("sparsify", "finetune")
        for key in ("epochs", "lr", "warmup_epochs", "schedule")
    ]
    baseline = Stage("baseline", _train_baseline, ("training", *lengths), (weights("baseline"),))
    trying = Stage("attempts", attempts.make_attempts, ("training", "sparsify", "cut", "finetune"))
    sparsify = attempts.take_sparsified if wants_attempts(recipe) else prune_stages.sparsify
    return [
        Stage("dense", _train_dense, ("model", "data", "training", "dense"), (weights("dense"),)),
        *([baseline] if wants_baseline(recipe) else []),
        *([trying] if wants_attempts(recipe) else []),
        Stage("sparsify", sparsify, ("training", "sparsify", "cut"), (weights("sparse"),)),
        Stage("cut", _cut, ("cut",), (pruned("checkpoints/cut"),)),
        Stage("finetune", _finetune, ("training", "finetune"), (pruned("pruned"),)),
        Stage("export", _export, ("export", "benchmark.provider"), ("dense.onnx", "pruned.onnx")),
        Stage("benchmark", _benchmark, ("benchmark",)),
        Stage("report", _report, (), ("report.json", "report.html")),
    ]


def _train_dense(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train from scratch or from the given weights (no epochs: only take them); note what the data are."""
    model = build_model(run.recipe, len(run.inputs.data.class_names), weights=True)
    run.train(model, run.recipe.dense, "dense", tick)
    run.keep_weights(model, "dense")
    data, config = run.inputs.data, run.inputs.config
    return {
        "data": {
            "description": data.description,
            "class_names": list(data.class_names),
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        "config": asdict(config),
        "model_args": run.inputs.model_args,
        **({} if wants_baseline(run.recipe) else _dense_figures(run, model)),
    }


def _cut(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Cut, and compare the sparse and the cut model on the test images."""
    cut = attempts.take_cut if wants_attempts(run.recipe) else prune_stages.cut
    return cut(run, tick) | _compare_on_test(run)


def _finetune(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train the cut model, then save it as the portable artifact, read that back, and test the model once."""
    attempted = wants_attempts(run.recipe)
    model, plan = attempts.take_finetuned(run) if attempted else prune_stages.finetune(run, tick)
    accuracy = run.evaluate(model, run.inputs.data.test)
    run.save_artifact(model, run.files.path / "pruned", plan, run.describe(test_accuracy=accuracy))
    round_trip = 0.0
    if run.files.writes:
        round_trip = check_round_trip(model, run.files.path / "pruned", run.validation_images())
    return {
        "accuracy": accuracy,
        "params": count_params(model),
        "macs": count_macs(model, run.example),
        "round_trip_max_abs": round_trip,
    }


def _train_baseline(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """The fair comparison: the dense model goes through the same epochs and rates, without penalty and cut."""
    model = run.weights("dense")
    recipe = run.recipe
    run.train(model, recipe.sparsify, "baseline", tick)
    run.train(model, recipe.finetune, "baseline-finetune", tick, first_epoch=recipe.sparsify.epochs)
    run.keep_weights(model, "baseline")
    return _dense_figures(run, model)


def _export(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Both models as ONNX files, compared with torch and tested through ONNX Runtime; then in fewer bits."""
    if not run.files.writes:
        return {}
    models = {"dense": run.final_dense(), "pruned": load_artifact(run.files.path / "pruned")}
    exported = {name: _export_one(run, name, model) for name, model in models.items()}
    return exported | {"variants": _export_variants(run)}


def _export_variants(run: Run) -> list[dict[str, Any]]:
    """The pruned model's file in fewer bits, with sizes and test accuracies."""
    if not run.recipe.export.precisions:
        return []
    with TemporaryDirectory() as folder:
        # Merged groups are for the float32 kernels.
        source = export_onnx(
            load_artifact(run.files.path / "pruned"),
            Path(folder) / "pruned.onnx",
            run.timed_example,
            opset=run.recipe.export.opset,
            merge_groups=False,
            metadata=read_metadata(run.files.path / "pruned.onnx"),
        )
        return [_export_variant(run, source, precision) for precision in run.recipe.export.precisions]


def _export_variant(run: Run, source: Path, precision: Precision) -> dict[str, Any]:
    path = run.files.path / f"pruned.{precision}.onnx"
    if precision == "int8":
        images = run.inputs.data.train
        n = min(run.recipe.export.calibration, len(images))
        chosen = np.random.default_rng(run.recipe.seed).permutation(len(images))[:n]
        loader = run.loader(images.subset(chosen), False)
        quantize_to_int8(source, path, (batch for batch, _ in loader))
    else:
        convert_to_fp16(source, path)
    test = run.loader(run.inputs.data.test, False)
    accuracy = onnx_accuracy(path, test, threads=run.recipe.benchmark.threads)
    return {"precision": precision, "onnx_bytes": path.stat().st_size, "accuracy_onnx": accuracy}


def _export_one(run: Run, name: str, model: nn.Module) -> dict[str, Any]:
    spec = run.recipe.export
    path = run.files.path / f"{name}.onnx"
    accuracy = final_accuracies(run.files)[name]
    write = partial(
        export_onnx,
        model.cpu(),
        opset=spec.opset,
        merge_groups=run.recipe.benchmark.provider == "cpu",
        metadata=metadata_texts(run.describe(test_accuracy=accuracy)),
    )
    write(path, run.timed_example)
    if spec.dynamic_batch:
        write(run.files.path / f"{name}.dynamic.onnx", run.timed_example, dynamic_batch=True)
    parity = check_parity(model, path, run.validation_images().cpu())
    if not parity.max_rel <= _PARITY_LIMIT:
        raise VerificationError(
            f"{path} gives other logits than torch: off by {parity.max_rel:.2g} of the largest"
        )
    test = run.loader(run.inputs.data.test, False)
    return {
        "parity": asdict(parity),
        "accuracy_onnx": onnx_accuracy(path, test, threads=run.recipe.benchmark.threads),
        "onnx_bytes": path.stat().st_size,
        "graph": asdict(take_census(path)),
    }


def _benchmark(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Latency of all the files in ONNX Runtime, interleaved."""
    if not run.files.writes:
        return {}
    spec = run.recipe.benchmark
    names = ["dense", "pruned", *(f"pruned.{precision}" for precision in run.recipe.export.precisions)]
    paths = [run.files.path / f"{name}.onnx" for name in names]
    compared = compare_latency(
        paths,
        threads=spec.threads,
        rounds=spec.rounds,
        warmup=spec.warmup,
        seed=run.recipe.seed,
        provider=spec.provider,
    )
    if not compared.trustworthy:
        run.say(f"benchmark: not trustworthy: {compared.reason}")
    return {"latency": compared.to_json(), "machine": describe_machine(), "versions": library_versions()}


def _report(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    if run.files.writes:
        write_report(run.files.path)
    return {}


# -------------------------------------------------------------------------------------- what the stages share


def _dense_figures(run: Run, model: nn.Module) -> dict[str, Any]:
    """Test accuracy (the one time the dense model sees the test images in torch), parameters and MACs."""
    model.to(run.accelerator.device)
    return {
        "accuracy": run.evaluate(model, run.inputs.data.test),
        "params": count_params(model),
        "macs": count_macs(model, run.example),
    }


def _compare_on_test(run: Run) -> dict[str, float]:
    """Test accuracy of the sparse and the cut model, and the largest change of any logit, over the test images."""
    device = run.accelerator.device
    sparse, pruned = run.weights("sparse"), load_artifact(run.files.checkpoints / "cut").to(device)
    change, largest, hits, count = 0.0, 0.0, [0, 0], 0
    with comparing(sparse), comparing(pruned):
        for images, labels in run.loader(run.inputs.data.test, False):
            before, after = sparse(images.to(device)), pruned(images.to(device))
            change = max(change, float((before - after).abs().max()))
            largest = max(largest, float(before.abs().max()))
            for i, logits in enumerate((before, after)):
                hits[i] += int((logits.argmax(1).cpu() == labels).sum())
            count += len(labels)
    return {
        "accuracy_before_cut": hits[0] / count,
        "accuracy_after_cut": hits[1] / count,
        "max_abs_logit_change": change,
        "max_abs_logit": largest,
    }
