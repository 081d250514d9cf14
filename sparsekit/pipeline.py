"""The story of a run, one stage after the other.

    dense -> sparsify -> cut -> finetune -> baseline -> export -> benchmark -> report

Every stage is journaled in the run directory: done stages are skipped on resume, a training stage goes on after
its last completed epoch. Stages hand over through files (weights, artifacts, ONNX) and small results in the
journal, so that a resumed run and an uninterrupted one read the same things.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import Tensor, nn

from sparsekit import artifact
from sparsekit.analysis import find_groups
from sparsekit.census import take_census
from sparsekit.checkpoint import load_state, save_state
from sparsekit.choice import Choice, choose_channels
from sparsekit.complexity import channel_latencies, channel_macs, count_macs, count_params
from sparsekit.data import Images, make_loader
from sparsekit.errors import FileError, InputError, RunError, SparsekitError, VerificationError
from sparsekit.export import export_onnx
from sparsekit.files import write_text
from sparsekit.fold import keep_carriers
from sparsekit.groups import ChannelGroup, ChannelGroups
from sparsekit.inputs import (
    Inputs,
    PhaseSpec,
    augmentation,
    build_model,
    channel_rounding,
    cut_target,
    group_rounding,
    kept_limits,
    make_accelerator,
    make_sparsifier,
    open_inputs,
    train_options,
    wants_baseline,
    wants_choice,
    wants_speed,
)
from sparsekit.inspection import Inspection, inspect_module
from sparsekit.latency import compare_latency
from sparsekit.layer_latency import measure_layers
from sparsekit.machine import describe_machine, library_versions
from sparsekit.masks import Masks, keep_masks
from sparsekit.models import (
    create_model,
    input_config,
    load_weights_,
    save_weights,
)
from sparsekit.modes import comparing
from sparsekit.parity import check_parity, onnx_accuracy
from sparsekit.plan import PrunePlan, make_plan
from sparsekit.planning import Planned
from sparsekit.quantize import Precision, convert_to_fp16, quantize_to_int8
from sparsekit.recalibration import recalibrate_batchnorms
from sparsekit.recipe import Recipe, dump_recipe
from sparsekit.report import RunReport
from sparsekit.run_directory import RunDirectory
from sparsekit.scores import channel_worth, zero_channels
from sparsekit.settling import Settling
from sparsekit.sparsifier import Sparsifier
from sparsekit.speed_search import SpeedSearch, search_speed, time_masks
from sparsekit.summary import build_report, final_accuracies, write_report
from sparsekit.surgery import apply_plan, verify_cut
from sparsekit.train import (
    Distillation,
    EpochMetrics,
    Loader,
    StepHook,
    evaluate,
    fit,
    steps_per_epoch,
)

# Parity is checked on this many validation images.
_PARITY_IMAGES = 64
# Float32 kernels that add in another order differ by 1e-6; ten times worse than any seen is a wrong graph.
_PARITY_LIMIT = 1e-3


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Run:
    """Everything a stage works with."""

    recipe: Recipe
    inputs: Inputs
    files: RunDirectory
    accelerator: Accelerator
    console: Console

    def say(self, message: str) -> None:
        """Print a line and put it in run.log (once, in a run of several processes)."""
        self.files.log(message)
        if self.accelerator.is_main_process:
            self.console.print(message, highlight=False, markup=False)

    @property
    def example(self) -> Tensor:
        """One input of the model, (1, channels, height, width), on the device."""
        return torch.zeros(1, *self.inputs.config.input_size, device=self.accelerator.device)


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
    run = _Run(recipe, inputs, files, accelerator, console)
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
        _check_speed(run)
    for stage in story:
        _run_stage(run, stage)
    return build_report(output)


@dataclass(frozen=True)
class _Stage:
    """A named step. It resumes only with what it began with: the recipe's `sections`, seed, precision, images.

    `leaves` are the files, below the run directory, that it is done with.
    """

    name: str
    body: Callable[[_Run, Callable[[], None]], dict[str, Any]]
    sections: tuple[str, ...]
    leaves: tuple[str, ...] = ()

    def settings(self, run: _Run) -> dict[str, Any]:
        values = run.recipe.model_dump(mode="json")
        kept = {key: values[key] for key in ("seed", "precision", *self.sections)}
        return {**kept, "images": run.inputs.fingerprint}


def _run_stage(run: _Run, stage: _Stage) -> None:
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


def _check_speed(run: _Run) -> None:
    """Measure how long the layers take, before hours are spent on a target that is met already, or never."""
    target = run.recipe.cut.target
    assert target is not None
    model = build_model(run.recipe, len(run.inputs.data.class_names), weights=False)
    groups = _with_latencies(run, model, find_groups(model, run.example.cpu(), **_cut_options(run.recipe)))
    dense_ms = sum(layer.ms or 0.0 for layer in groups.layers)
    worth = {group.name: torch.ones(group.n_channels) for group in groups.free}
    most = 1 / Choice(groups, worth, group_rounding(run.recipe, groups)).least("latency")
    asked = target.speedup or dense_ms / (target.latency_ms or dense_ms)
    if asked <= 1:
        raise InputError(
            f"cut.target.latency_ms {target.latency_ms:g} is met already: the dense model takes {dense_ms:.3g} ms in "
            "ONNX Runtime; ask for less, or leave it out"
        )
    # Predictions are a few per cent off; what is far beyond is beyond.
    if asked > 1.1 * most:
        raise InputError(
            f"cut.target asks for {asked:.3g} times the speed, and with the fewest channels allowed the model is "
            f"predicted to be about {most:.3g} times as fast; ask for less, lower cut.min_channels, or free more with "
            "cut.through_layer_norm or cut.blocks"
        )
    run.say(f"the dense model takes {dense_ms:.3g} ms, and can be made up to about {most:.2g} times as fast")


def _train_dense(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train from scratch or from the given weights (no epochs: only take them); note what the data are."""
    model = build_model(run.recipe, len(run.inputs.data.class_names), weights=True)
    _train(run, model, run.recipe.dense, "dense", tick)
    _keep_weights(run, model, "dense")
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


def _sparsify(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train with the penalty until channels are exactly zero."""
    spec = run.recipe.sparsify
    model = _with_weights(run, "dense")
    groups = _groups(run, model)
    hook: Sparsifier | Settling | None = None
    if spec.epochs:
        options, loader = train_options(run.recipe, spec), _loader(run, run.inputs.data.train, True)
        steps = spec.epochs * steps_per_epoch(loader, options, run.accelerator)
        costs = _channel_costs(run, model, groups)
        sparsifier = make_sparsifier(run.recipe, model, groups, total_steps=steps, costs=costs)
        hook = sparsifier
        if spec.strength == "auto" and wants_choice(run.recipe):
            measured = _with_latencies(run, model, groups)
            at = max(round(steps * spec.warmup), 1)
            hook = Settling(sparsifier, at, lambda worth: _chosen(run, model, measured, worth))
        _train(run, model, spec, "sparsify", tick, hook=hook)
    settled = hook if isinstance(hook, Settling) else None
    if settled is not None and run.files.writes:
        save_state(run.files.checkpoints / "settled.safetensors", settled.masks)
    _keep_weights(run, model, "sparse")
    zeros = sum(int(dead.sum()) for dead in zero_channels(model, groups).values())
    channels = sum(group.n_channels for group in groups.free)
    return {
        "zero_channels": zeros,
        "channels": channels,
        "shortfall": "" if hook is None else hook.shortfall(),
        "choice": {} if settled is None else dict(settled.notes),
    }


def _with_latencies(run: _Run, model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    """Groups whose layers are measured if the target is a speed; by the first process, so that all agree."""
    if not wants_speed(run.recipe):
        return groups
    threads, example = run.recipe.benchmark.threads, _timed_example(run)
    return _by_the_first(run, lambda: measure_layers(_on_cpu(model), groups, example, threads=threads))


def _by_the_first(run: _Run, action: Callable[[], _Result]) -> _Result:
    """What the first process finds, for all: they have to agree, and times differ. An error is all's too."""
    shared: list[Any] = [None, None]
    if run.accelerator.is_main_process:
        try:
            shared[0] = action()
        except SparsekitError as error:
            shared[1] = error
        except Exception as error:
            shared[1] = RunError(f"{type(error).__name__}: {error}")
            shared[1].__cause__ = error if run.accelerator.num_processes == 1 else None
    broadcast_object_list(shared)
    if shared[1] is not None:
        raise shared[1]
    found: _Result = shared[0]
    return found


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy on the CPU, without the forward that accelerate may have put on the model."""
    duplicate = copy.deepcopy(model).cpu()
    for name in ("forward", "_original_forward"):
        duplicate.__dict__.pop(name, None)
    return duplicate


def _timed_example(run: _Run) -> Tensor:
    return torch.zeros(run.recipe.export.batch_size, *run.inputs.config.input_size)


def _chosen(run: _Run, model: nn.Module, groups: ChannelGroups, worth: Masks) -> tuple[Masks, dict[str, Any]]:
    """Masks for the target, and notes on how they were found."""

    def choose() -> tuple[Masks, dict[str, Any]]:
        rounding = group_rounding(run.recipe, groups)
        multiples = {name: multiple for name, (multiple, _) in rounding.items()}
        if not wants_speed(run.recipe):
            masks = choose_channels(groups, worth, kept_limits(run.recipe), rounding)
            return masks, {"multiples": multiples}
        search = _searched(run.recipe, _on_cpu(model), groups, worth, _timed_example(run), run.say)
        notes = {"asked": search.asked, "remark": search.remark, "found": asdict(search.found)}
        trials = [asdict(trial) for trial in search.trials]
        return search.masks, notes | {"trials": trials, "multiples": multiples}

    return _by_the_first(run, choose)


def _channel_costs(run: _Run, model: nn.Module, groups: ChannelGroups) -> dict[str, float] | None:
    """What a channel of each group costs; measured by the first process, so that all agree."""
    recipe = run.recipe
    if recipe.sparsify.weigh_by == "size" or wants_choice(recipe):
        return None
    if recipe.sparsify.weigh_by == "macs":
        return channel_macs(groups)
    threads, example = recipe.benchmark.threads, _timed_example(run)

    def measure() -> dict[str, float]:
        return channel_latencies(measure_layers(_on_cpu(model), groups, example, threads=threads))

    return _by_the_first(run, measure)


def _searched(
    recipe: Recipe,
    model: nn.Module,
    groups: ChannelGroups,
    worth: Masks,
    example: Tensor,
    say: Callable[[str], None],
) -> SpeedSearch:
    target = recipe.cut.target
    assert target is not None
    return search_speed(
        model,
        groups,
        worth,
        example,
        speedup=target.speedup,
        latency_ms=target.latency_ms,
        limits=kept_limits(recipe),
        rounding=group_rounding(recipe, groups),
        threads=recipe.benchmark.threads,
        progress=lambda trial: say(
            f"choice: predicted to be {trial.predicted:.3g} times as fast, measured {trial.measured:.3g}"
        ),
    )


def _cut(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Scores, masks, plan, surgery, proof. The sparse and the cut model are compared on the test images."""
    model = _with_weights(run, "sparse")
    groups = _groups(run, model)
    masks, choice = _cut_masks(run, model, groups)
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
        _save_artifact(run, pruned, run.files.checkpoints / "cut", plan, {})
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


def _cut_masks(run: _Run, model: nn.Module, groups: ChannelGroups) -> tuple[Masks, dict[str, Any]]:
    """Keep-masks, and notes on how they were chosen: in training already, or here, where the target is more than one
    share.
    """
    spec = run.recipe.cut
    settled = run.files.checkpoints / "settled.safetensors"
    if wants_choice(run.recipe) and spec.method in ("auto", "budget"):
        if settled.exists():
            return load_state(settled), run.files.result("sparsify")["choice"]
        return _chosen(run, model, _with_latencies(run, model, groups), channel_worth(model, groups))
    masks = keep_masks(
        model,
        groups,
        method=spec.method,
        threshold=spec.threshold,
        relative=spec.relative,
        target=cut_target(run.recipe),
        round_to=channel_rounding(run.recipe),
        min_channels=spec.min_channels,
    )
    return masks, {}


def _kept(group: ChannelGroup, masks: Masks, plan: PrunePlan) -> int:
    if any(group.lies_in(block.module) for block in plan.blocks):
        return 0
    return int(masks[group.name].sum()) if group.name in masks else group.n_channels


def _finetune(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train the cut model without penalty, then save it as the portable artifact and test it once."""
    spec = run.recipe.finetune
    cut = run.files.checkpoints / "cut"
    model = artifact.load(cut).to(run.accelerator.device)
    _recalibrate(run, model)
    teacher = None
    if spec.distill is not None and spec.epochs:
        teacher = Distillation(_with_weights(run, "dense"), spec.distill.weight, spec.distill.temperature)
    _train(run, model, spec, "finetune", tick, teacher=teacher)
    accuracy = evaluate(model, _loader(run, run.inputs.data.test, False), run.accelerator).accuracy
    round_trip = 0.0
    if run.files.writes:
        plan = PrunePlan.from_json(artifact.read_structure(cut)["plan"])
        _save_artifact(run, model, run.files.path / "pruned", plan, _description(run, accuracy))
        round_trip = artifact.check_round_trip(model, run.files.path / "pruned", _validation_images(run))
    return {
        "accuracy": accuracy,
        "params": count_params(model),
        "macs": count_macs(model, run.example),
        "round_trip_max_abs": round_trip,
    }


def _train_baseline(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """The fair comparison: the dense model goes through the same epochs and rates, without penalty and cut."""
    model = _with_weights(run, "dense")
    recipe = run.recipe
    _train(run, model, recipe.sparsify, "baseline", tick)
    _train(run, model, recipe.finetune, "baseline-finetune", tick, first_epoch=recipe.sparsify.epochs)
    _keep_weights(run, model, "baseline")
    return _dense_figures(run, model)


def _export(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Both models as ONNX files, compared with torch and tested through ONNX Runtime; then in fewer bits."""
    if not run.files.writes:
        return {}
    models = {"dense": _final_dense(run), "pruned": artifact.load(run.files.path / "pruned")}
    exported = {name: _export_one(run, name, model) for name, model in models.items()}
    return exported | {"variants": [_export_variant(run, p) for p in run.recipe.export.precisions]}


def _export_variant(run: _Run, precision: Precision) -> dict[str, Any]:
    """The pruned model's file in fewer bits, with its size and test accuracy."""
    source, path = run.files.path / "pruned.onnx", run.files.path / f"pruned.{precision}.onnx"
    if precision == "int8":
        images = run.inputs.data.train
        n = min(run.recipe.export.calibration, len(images))
        chosen = np.random.default_rng(run.recipe.seed).permutation(len(images))[:n]
        loader = _loader(run, images.subset(chosen), False)
        quantize_to_int8(source, path, (batch for batch, _ in loader))
    else:
        convert_to_fp16(source, path)
    test = _loader(run, run.inputs.data.test, False)
    accuracy = onnx_accuracy(path, test, threads=run.recipe.benchmark.threads)
    return {"precision": precision, "onnx_bytes": path.stat().st_size, "accuracy_onnx": accuracy}


def _export_one(run: _Run, name: str, model: nn.Module) -> dict[str, Any]:
    spec = run.recipe.export
    path = run.files.path / f"{name}.onnx"
    accuracy = final_accuracies(run.files)[name]
    example = torch.zeros(spec.batch_size, *run.inputs.config.input_size)
    write = partial(
        export_onnx, model.cpu(), opset=spec.opset, metadata=_metadata(_description(run, accuracy))
    )
    write(path, example)
    if spec.dynamic_batch:
        write(run.files.path / f"{name}.dynamic.onnx", example, dynamic_batch=True)
    parity = check_parity(model, path, _validation_images(run).cpu())
    if not parity.max_rel <= _PARITY_LIMIT:
        raise VerificationError(
            f"{path} gives other logits than torch: off by {parity.max_rel:.2g} of the largest"
        )
    test = _loader(run, run.inputs.data.test, False)
    return {
        "parity": asdict(parity),
        "accuracy_onnx": onnx_accuracy(path, test, threads=run.recipe.benchmark.threads),
        "onnx_bytes": path.stat().st_size,
        "graph": asdict(take_census(path)),
    }


def _benchmark(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
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


def _report(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    if run.files.writes:
        write_report(run.files.path)
    return {}


# -------------------------------------------------------------------------------------- what the stages share


def _train(
    run: _Run,
    model: nn.Module,
    phase: PhaseSpec,
    name: str,
    tick: Callable[[], None],
    *,
    hook: StepHook | None = None,
    teacher: Distillation | None = None,
    first_epoch: int = 0,
) -> None:
    """One phase of training, resumed from its state file if there is one."""
    if not phase.epochs:
        return
    shown = name.partition("-")[0]

    def note(metrics: EpochMetrics) -> None:
        row = replace(metrics, phase=shown, epoch=metrics.epoch + first_epoch)
        run.files.add_metrics(asdict(row))
        tick()

    history = fit(
        model,
        (_loader(run, run.inputs.data.train, True), _loader(run, run.inputs.data.validation, False)),
        train_options(run.recipe, phase),
        phase=name,
        seed=run.recipe.seed,
        accelerator=run.accelerator,
        hook=hook,
        teacher=teacher,
        state_path=run.files.checkpoints / f"{name}.state.safetensors",
        on_epoch=note,
        console=run.console,
    )
    for metrics in history:  # an epoch may have been trained but not noted when the process was killed
        note(metrics)


def _loader(run: _Run, images: Images, training: bool) -> Loader:
    spec = run.recipe.data
    return make_loader(
        images,
        run.inputs.config,
        training=training,
        batch_size=spec.batch_size if training else spec.eval_batch_size or spec.batch_size,
        workers=spec.workers,
        augment=augmentation(run.recipe) if training else None,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def _recalibrate(run: _Run, model: nn.Module) -> None:
    """BatchNorm statistics from random training images, if the recipe asks for it."""
    images, spec = run.inputs.data.train, run.recipe.data
    size = spec.eval_batch_size or spec.batch_size
    n = min(run.recipe.cut.recalibrate, len(images))
    if n:
        chosen = np.random.default_rng(run.recipe.seed).permutation(len(images))[
            : max(n - n % size, min(n, size))
        ]
        loader = _loader(run, images.subset(chosen), training=False)
        recalibrate_batchnorms(model, (batch.to(run.accelerator.device) for batch, _ in loader))


def _groups(run: _Run, model: nn.Module) -> ChannelGroups:
    return find_groups(model, run.example, **_cut_options(run.recipe))


def _cut_options(recipe: Recipe) -> dict[str, Any]:
    cut = recipe.cut
    return {
        "ignore": cut.ignore,
        "through_layer_norm": cut.through_layer_norm,
        "blocks": cut.blocks,
    }


def _keep_weights(run: _Run, model: nn.Module, name: str) -> None:
    if run.files.writes:
        save_weights(model, run.files.checkpoints / f"{name}.safetensors")
    run.accelerator.wait_for_everyone()


def _with_weights(run: _Run, name: str) -> nn.Module:
    """A dense model on the device, with the weights an earlier stage kept."""
    num_classes = len(run.inputs.data.class_names)
    model = build_model(run.recipe, num_classes, weights=False)
    load_weights_(model, run.files.checkpoints / f"{name}.safetensors", num_classes=num_classes)
    return model.to(run.accelerator.device)


def _final_dense(run: _Run) -> nn.Module:
    return _with_weights(run, "baseline" if wants_baseline(run.recipe) else "dense")


def _dense_figures(run: _Run, model: nn.Module) -> dict[str, Any]:
    """Test accuracy (the one time the dense model sees the test images in torch), parameters and MACs."""
    model.to(run.accelerator.device)
    return {
        "accuracy": evaluate(model, _loader(run, run.inputs.data.test, False), run.accelerator).accuracy,
        "params": count_params(model),
        "macs": count_macs(model, run.example),
    }


def _save_artifact(run: _Run, model: nn.Module, path: Path, plan: PrunePlan, info: Mapping[str, Any]) -> None:
    artifact.save(
        model,
        path,
        model_name=run.recipe.model.name,
        model_args=run.inputs.model_args,
        plan=plan,
        info=info,
    )


def _validation_images(run: _Run) -> Tensor:
    """The first validation images, (n, channels, height, width), on the device."""
    batches: Iterator[Any] = iter(_loader(run, run.inputs.data.validation, False))
    images: Tensor = torch.cat([next(batches)[0]])
    for batch in batches:
        if len(images) >= _PARITY_IMAGES:
            break
        images = torch.cat([images, batch[0]])
    return images[:_PARITY_IMAGES].to(run.accelerator.device)


def _compare_on_test(run: _Run, sparse: nn.Module, pruned: nn.Module) -> dict[str, float]:
    """Test accuracy of both and the largest change of any logit, over the test images."""
    device = run.accelerator.device
    change, largest, hits, count = 0.0, 0.0, [0, 0], 0
    with comparing(sparse), comparing(pruned):
        for images, labels in _loader(run, run.inputs.data.test, False):
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


def _description(run: _Run, accuracy: float) -> dict[str, Any]:
    """What artifact and ONNX file say about themselves: enough to feed them and to know where they come from."""
    return {
        "model": run.recipe.model.name,
        "class_names": list(run.inputs.data.class_names),
        **asdict(run.inputs.config),
        "test_accuracy": accuracy,
        "recipe": dump_recipe(run.recipe),
        "versions": library_versions(),
    }


def _metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """The same as texts, which is all that an ONNX file's metadata can hold."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


# ----------------------------------------------------------------------------- the other commands of the line


def report_again(run: Path) -> RunReport:
    """Write report.json and report.html of a finished run again."""
    return write_report(run)


def inspect_model(
    name: str,
    *,
    image_size: int | None,
    recipe: Recipe | None,
    through_layer_norm: bool = False,
    blocks: bool = False,
) -> Inspection:
    """Groups of a timm model, or of a recipe's model as its data, arguments and section `cut` make it."""
    if recipe is not None:
        inputs = open_inputs(recipe)
        model = build_model(recipe, len(inputs.data.class_names), weights=False)
        example = torch.zeros(1, *inputs.config.input_size)
        cut = recipe.cut
        return inspect_module(
            name,
            model,
            example,
            cut.ignore,
            through_layer_norm=through_layer_norm or cut.through_layer_norm,
            blocks=blocks or cut.blocks,
        )
    model = create_model(name, num_classes=1000, image_size=image_size)
    config = input_config(model, image_size=image_size)
    example = torch.zeros(1, *config.input_size)
    return inspect_module(name, model, example, through_layer_norm=through_layer_norm, blocks=blocks)


def plan_cut(recipe: Recipe, *, run: Path | None, console: Console) -> Planned:
    """What the recipe's target would keep, by the sizes of the filters, and how fast that is; trains nothing.

    The weights are those of the dense model of the run directory `run`, or what the recipe starts from. Raises
    InputError for a recipe without a target, FileError for a run that has not trained its dense model.
    """
    if recipe.cut.target is None:
        raise InputError("the recipe has no cut.target to plan for; add --set 'cut.target={speedup: 2}'")
    inputs = open_inputs(recipe)
    n_classes = len(inputs.data.class_names)
    model = build_model(recipe, n_classes, weights=run is None).eval()
    if run is not None:
        load_weights_(model, run / "checkpoints" / "dense.safetensors", num_classes=n_classes)
    trained = run is not None or recipe.model.pretrained or recipe.model.checkpoint is not None
    example = torch.zeros(1, *inputs.config.input_size)
    timed = torch.zeros(recipe.export.batch_size, *inputs.config.input_size)
    threads = recipe.benchmark.threads
    with console.status("measuring"):
        unmeasured = find_groups(model, example, **_cut_options(recipe))
        groups = measure_layers(model, unmeasured, timed, threads=threads)
        worth = channel_worth(model, groups)
        remark = "" if trained else "the weights are random: how many channels go is real, which ones is not"
        if wants_speed(recipe):
            search = _searched(
                recipe, model, groups, worth, timed, lambda line: console.print(line, highlight=False)
            )
            masks, found, trials = search.masks, search.found, search.trials
            remark = "; ".join(filter(None, (search.remark, remark)))
        else:
            if wants_choice(recipe):
                masks = choose_channels(
                    groups, worth, kept_limits(recipe), group_rounding(recipe, unmeasured)
                )
            else:
                masks = keep_masks(
                    model,
                    groups,
                    method="budget",
                    target=cut_target(recipe),
                    round_to=channel_rounding(recipe),
                    min_channels=recipe.cut.min_channels,
                )
            found = time_masks(model, groups, masks, timed, threads=threads)
            trials = (found,)
    target = recipe.cut.target.model_dump(exclude_none=True)
    return Planned(recipe.model.name, target, groups, masks, found, trials, remark)


def export_again(
    source: Path, *, output: Path | None, opset: int | None, batch_size: int | None, dynamic_batch: bool
) -> Path:
    """Export the artifact in `source`, or in the run directory `source`, as ONNX; returns the file.

    Without `output` the file is named after the artifact and what was asked for (pruned.b8.onnx) and lies beside
    it. Raises FileError if that is there already: a run's files are what its report measured.
    """
    folder = source if (source / "structure.json").exists() else source / "pruned"
    if not (folder / "structure.json").exists():
        raise FileError(
            f"{source} holds no artifact: neither structure.json nor pruned/structure.json is there"
        )
    info = artifact.read_structure(folder)["info"]
    size = info.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
        raise FileError(
            f"{folder}/structure.json does not say the input size as [channels, height, width], got {size!r:.40}; "
            "export with sparsekit.export_onnx"
        )
    asked = ("dynamic" if dynamic_batch else f"b{batch_size or 1}", *([f"opset{opset}"] if opset else []))
    target = output or folder.parent / ".".join((folder.resolve().name, *asked, "onnx"))
    if output is None and target.exists():
        raise FileError(f"{target} is already there; name another file with --output")
    example = torch.zeros(batch_size or 1, *size)
    model = artifact.load(folder)
    return export_onnx(
        model, target, example, opset=opset, dynamic_batch=dynamic_batch, metadata=_metadata(info)
    )
