"""The story of a run, one stage after the other.

    dense -> sparsify -> cut -> finetune -> baseline -> export -> benchmark -> report

Every stage is journaled in the run directory: done stages are skipped on resume, a training stage goes on after
its last completed epoch. Stages hand over through files (weights, artifacts, ONNX) and small results in the
journal, so that a resumed run and an uninterrupted one read the same things.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from sparsekit import artifact
from sparsekit.census import take_census
from sparsekit.checkpoint import save_state
from sparsekit.complexity import count_macs, count_params
from sparsekit.errors import FileError, InputError, VerificationError
from sparsekit.export import export_onnx, metadata_texts
from sparsekit.files import write_text
from sparsekit.fold import keep_carriers
from sparsekit.groups import ChannelGroup
from sparsekit.inputs import (
    build_model,
    channel_rounding,
    make_accelerator,
    make_sparsifier,
    open_inputs,
    train_options,
    wants_baseline,
    wants_choice,
    wants_speed,
)
from sparsekit.latency import compare_latency
from sparsekit.machine import describe_machine, library_versions
from sparsekit.masks import Masks
from sparsekit.modes import comparing
from sparsekit.parity import check_parity, onnx_accuracy
from sparsekit.plan import PrunePlan, make_plan
from sparsekit.quantize import Precision, convert_to_fp16, quantize_to_int8
from sparsekit.recipe import Recipe, dump_recipe
from sparsekit.report import RunReport
from sparsekit.run import Run
from sparsekit.run_directory import RunDirectory
from sparsekit.scores import zero_channels
from sparsekit.settling import Settling
from sparsekit.sparsifier import Sparsifier
from sparsekit.summary import build_report, final_accuracies, write_report
from sparsekit.surgery import apply_plan, verify_cut
from sparsekit.targets import channel_costs, check_speed, choose_masks, cut_masks, with_latencies
from sparsekit.train import Distillation, evaluate, steps_per_epoch

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
    weights, pruned = "checkpoints/{}.safetensors".format, "{}/model.safetensors".format
    baseline = _Stage(
        "baseline", _train_baseline, ("training", "sparsify", "finetune"), (weights("baseline"),)
    )
    story = [
        _Stage("dense", _train_dense, ("model", "data", "training", "dense"), (weights("dense"),)),
        _Stage("sparsify", _sparsify, ("training", "sparsify", "cut"), (weights("sparse"),)),
        _Stage("cut", _cut, ("cut",), (pruned("checkpoints/cut"),)),
        _Stage("finetune", _finetune, ("training", "finetune"), (pruned("pruned"),)),
        *([baseline] if wants_baseline(recipe) else []),
        _Stage("export", _export, ("export",), ("dense.onnx", "pruned.onnx")),
        _Stage("benchmark", _benchmark, ("benchmark",)),
        _Stage("report", _report, (), ("report.json", "report.html")),
    ]
    for stage in story:  # all of them before anything is written: a refused resume leaves the run as it was
        files.check_settings(stage.name, stage.settings(run))
    if files.writes:
        write_text(output / "recipe.yaml", dump_recipe(recipe))
    if wants_speed(recipe) and not files.is_done("cut"):
        check_speed(run)
    for stage in story:
        _run_stage(run, stage)
    return build_report(output)


@dataclass(frozen=True)
class _Stage:
    """A named step. It resumes only with what it began with: the recipe's `sections`, seed, precision, images.

    `leaves` are the files, below the run directory, that it is done with.
    """

    name: str
    body: Callable[[Run, Callable[[], None]], dict[str, Any]]
    sections: tuple[str, ...]
    leaves: tuple[str, ...] = ()

    def settings(self, run: Run) -> dict[str, Any]:
        values = run.recipe.model_dump(mode="json")
        kept = {key: values[key] for key in ("seed", "precision", *self.sections)}
        return {**kept, "images": run.inputs.fingerprint}


def _run_stage(run: Run, stage: _Stage) -> None:
    """Run one stage unless it is done; `tick` notes the seconds so far, over all attempts."""
    name = stage.name
    record = run.files.begin(name, stage.settings(run))
    if record.status == "done":
        missing = [leaf for leaf in stage.leaves if not (run.files.path / leaf).exists()]
        if missing:
            raise FileError(
                f"the stage {name} of the run in {run.files.path} is done, but {', '.join(missing)} is gone; put it "
                "back, or start again in another --output"
            )
        run.say(f"{name}: done before")
        return
    started = time.monotonic() - record.seconds

    def tick() -> None:
        run.files.advance(record, time.monotonic() - started)

    run.say(f"{name} ...")
    try:
        result = stage.body(run, tick)
    except BaseException as error:
        run.files.log(f"{name}: stopped by {type(error).__name__}: {error}")
        raise
    run.accelerator.wait_for_everyone()
    tick()
    run.files.finish(record, result)
    if run.files.writes:
        for state in run.files.training_states(name):
            state.unlink()  # only an unfinished stage needs it
    run.accelerator.wait_for_everyone()
    run.say(f"{name}: {record.seconds:.1f} s{_told(name, result)}")


def _told(name: str, result: Mapping[str, Any]) -> str:
    """What a finished stage says besides its duration."""
    if name == "cut":
        return (
            f"; {result['removed']} of {result['channels']} channels removed, test accuracy "
            f"{result['accuracy_before_cut']:.4f} -> {result['accuracy_after_cut']:.4f}, largest logit change "
            f"{result['max_abs_logit_change']:.1e}"
        )
    return ""


# ----------------------------------------------------------------------------------------------- the stages


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


def _sparsify(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train with the penalty until channels are exactly zero."""
    spec = run.recipe.sparsify
    model = run.weights("dense")
    groups = run.find_groups(model)
    hook: Sparsifier | Settling | None = None
    if spec.epochs:
        options, loader = train_options(run.recipe, spec), run.loader(run.inputs.data.train, True)
        steps = spec.epochs * steps_per_epoch(loader, options, run.accelerator)
        costs = channel_costs(run, model, groups)
        sparsifier = make_sparsifier(run.recipe, model, groups, total_steps=steps, costs=costs)
        hook = sparsifier
        if spec.strength == "auto" and wants_choice(run.recipe):
            measured = with_latencies(run, model, groups)
            at = max(round(steps * spec.warmup), 1)
            hook = Settling(sparsifier, at, lambda worth: choose_masks(run, model, measured, worth))
        run.train(model, spec, "sparsify", tick, hook=hook)
    settled = hook if isinstance(hook, Settling) else None
    if settled is not None and run.files.writes:
        save_state(run.files.checkpoints / "settled.safetensors", settled.masks)
    run.keep_weights(model, "sparse")
    zeros = sum(int(dead.sum()) for dead in zero_channels(model, groups).values())
    channels = sum(group.n_channels for group in groups.free)
    return {
        "zero_channels": zeros,
        "channels": channels,
        "shortfall": "" if hook is None else hook.shortfall(),
        "choice": {} if settled is None else dict(settled.notes),
    }


def _cut(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Scores, masks, plan, surgery, proof. The sparse and the cut model are compared on the test images."""
    model = run.weights("sparse")
    groups = run.find_groups(model)
    masks, choice = cut_masks(run, model, groups)
    multiples = choice.get("multiples") or channel_rounding(run.recipe)
    masks = keep_carriers(model, groups, masks, round_to=multiples)
    plan = make_plan(groups, masks)
    if not (plan.cuts or plan.blocks):
        raise InputError(
            f"cut: nothing to remove: in no group {channel_rounding(run.recipe)} channels are zero or score too low; "
            "set cut.target, raise sparsify.strength, or lower cut.round_to"
        )
    pruned = apply_plan(model, plan)
    proof = verify_cut(model, pruned, plan)
    if run.files.writes:
        run.save_artifact(pruned, run.files.checkpoints / "cut", plan, {})
    zeros = zero_channels(model, groups)
    live = sum(int((~masks[name] & ~dead).sum()) for name, dead in zeros.items())
    return {
        **_compare_on_test(run, model, pruned),
        "proof_max_rel": proof.max_rel,
        "near_zero_channels": sum(int(dead.sum()) for dead in zeros.values()),
        "channels": sum(len(mask) for mask in masks.values()),
        "removed": sum(group.n_channels - _kept(group, masks, plan) for group in groups.free),
        "removed_live": live,
        "choice": choice,
        "layers": [
            {
                "name": group.name,
                "channels": group.n_channels,
                "kept": _kept(group, masks, plan),
                "reason": group.frozen,
            }
            for group in groups
        ],
    }


def _kept(group: ChannelGroup, masks: Masks, plan: PrunePlan) -> int:
    if any(group.lies_in(block.module) for block in plan.blocks):
        return 0
    return int(masks[group.name].sum()) if group.name in masks else group.n_channels


def _finetune(run: Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train the cut model without penalty, then save it as the portable artifact and test it once."""
    spec = run.recipe.finetune
    cut = run.files.checkpoints / "cut"
    model = artifact.load(cut).to(run.accelerator.device)
    run.recalibrate(model)
    teacher = None
    if spec.distill is not None and spec.epochs:
        teacher = Distillation(run.weights("dense"), spec.distill.weight, spec.distill.temperature)
    run.train(model, spec, "finetune", tick, teacher=teacher)
    accuracy = evaluate(model, run.loader(run.inputs.data.test, False), run.accelerator).accuracy
    round_trip = 0.0
    if run.files.writes:
        plan = PrunePlan.from_json(artifact.read_structure(cut)["plan"])
        run.save_artifact(model, run.files.path / "pruned", plan, run.describe(accuracy))
        round_trip = artifact.check_round_trip(model, run.files.path / "pruned", run.validation_images())
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
    models = {"dense": run.final_dense(), "pruned": artifact.load(run.files.path / "pruned")}
    exported = {name: _export_one(run, name, model) for name, model in models.items()}
    return exported | {"variants": [_export_variant(run, p) for p in run.recipe.export.precisions]}


def _export_variant(run: Run, precision: Precision) -> dict[str, Any]:
    """The pruned model's file in fewer bits, with its size and test accuracy."""
    source, path = run.files.path / "pruned.onnx", run.files.path / f"pruned.{precision}.onnx"
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
    example = torch.zeros(spec.batch_size, *run.inputs.config.input_size)
    write = partial(
        export_onnx, model.cpu(), opset=spec.opset, metadata=metadata_texts(run.describe(accuracy))
    )
    write(path, example)
    if spec.dynamic_batch:
        write(run.files.path / f"{name}.dynamic.onnx", example, dynamic_batch=True)
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
        "accuracy": evaluate(model, run.loader(run.inputs.data.test, False), run.accelerator).accuracy,
        "params": count_params(model),
        "macs": count_macs(model, run.example),
    }


def _compare_on_test(run: Run, sparse: nn.Module, pruned: nn.Module) -> dict[str, float]:
    """Test accuracy of both and the largest change of any logit, over the test images."""
    device = run.accelerator.device
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


# ----------------------------------------------------------------------------- the other commands of the line
