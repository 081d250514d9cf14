"""The story of a run, one stage after the other. The only module besides the command line that reads a recipe.

    dense -> sparsify -> cut -> finetune -> baseline -> export -> benchmark -> report

Every stage is journaled in the run directory: done stages are skipped on resume, a training stage goes on after
its last completed epoch. Stages hand over through files (weights, artifacts, ONNX) and small results in the
journal, so that a resumed run and an uninterrupted one read the same things.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from sparsekit import artifact
from sparsekit.analysis import find_groups
from sparsekit.complexity import count_macs, count_params
from sparsekit.data import Augment, ImageData, Images, make_loader, open_data
from sparsekit.errors import FileError, InputError, ModelError
from sparsekit.export import export_onnx, read_metadata
from sparsekit.files import write_text
from sparsekit.groups import ChannelGroups
from sparsekit.inspection import Inspection, inspect_module
from sparsekit.latency import compare_latency
from sparsekit.machine import channel_multiple, check_threads, describe_machine, library_versions
from sparsekit.masks import Quantity, keep_masks
from sparsekit.models import (
    InputConfig,
    build_arguments,
    create_model,
    input_config,
    load_weights_,
    save_weights,
)
from sparsekit.modes import evaluating
from sparsekit.parity import check_parity, onnx_accuracy
from sparsekit.plan import PrunePlan, make_plan
from sparsekit.recipe import DenseSpec, FinetuneSpec, Recipe, SparsifySpec, dump_recipe, load_recipe
from sparsekit.report import RunReport, write_html, write_json
from sparsekit.run_directory import RunDirectory
from sparsekit.schedules import PhaseShares
from sparsekit.scores import zero_channels
from sparsekit.sparsifier import Sparsifier
from sparsekit.surgery import apply_plan, verify_cut
from sparsekit.train import (
    Distillation,
    EpochMetrics,
    Loader,
    StepHook,
    TrainOptions,
    evaluate,
    fit,
    seed_everything,
    steps_per_epoch,
)

# Parity is checked on this many validation images.
_PARITY_IMAGES = 64


@dataclass(frozen=True)
class _Inputs:
    """What a recipe names, opened: images, how they become tensors, and the arguments timm builds the model with."""

    data: ImageData
    config: InputConfig
    model_args: dict[str, Any]
    groups_ignored: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    """Everything a stage works with."""

    recipe: Recipe
    inputs: _Inputs
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
    inputs = _open_inputs(recipe)
    accelerator = _make_accelerator(recipe)
    files = RunDirectory(output, writes=accelerator.is_main_process)
    files.open(resume=resume)
    run = _Run(recipe, inputs, files, accelerator, console)
    if files.writes:
        write_text(output / "recipe.yaml", dump_recipe(recipe))
    with_baseline = _wants_baseline(recipe)

    _stage(run, "dense", _train_dense, ("model", "data", "training", "dense"))
    _stage(run, "sparsify", _sparsify, ("training", "sparsify", "cut"))
    _stage(run, "cut", _cut, ("cut",))
    _stage(run, "finetune", _finetune, ("training", "finetune"))
    if with_baseline:
        _stage(run, "baseline", _train_baseline, ("training", "sparsify", "finetune"))
    _stage(run, "export", _export, ("export",))
    _stage(run, "benchmark", _benchmark, ("benchmark",))
    _stage(run, "report", _report, ())
    return build_report(output)


def _stage(
    run: _Run,
    name: str,
    body: Callable[[_Run, Callable[[], None]], dict[str, Any]],
    sections: tuple[str, ...],
) -> None:
    """Run one stage unless it is done. Its settings are journaled: a stage resumes only with those it began with."""
    values = run.recipe.model_dump(mode="json")
    kept = ("seed", "precision", *sections)
    record = run.files.begin(name, {key: values[key] for key in kept})
    if record.status == "done":
        run.say(f"{name}: done before")
        return
    started = time.monotonic() - record.seconds

    def tick() -> None:
        run.files.advance(record, time.monotonic() - started)

    run.say(f"{name} ...")
    result = body(run, tick)
    run.accelerator.wait_for_everyone()
    tick()
    run.files.finish(record, result)
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


# ------------------------------------------------------------------------------------------- opening the input


def check_inputs(recipe: Recipe) -> list[str]:
    """Problems of a valid recipe with the world: model name, data, checkpoint, device, threads. Trains nothing."""
    try:
        _open_inputs(recipe)
    except InputError as error:
        return str(error).splitlines()
    return []


def _open_inputs(recipe: Recipe) -> _Inputs:
    """Open data and model. Raises InputError with one line for each problem, all at once."""
    problems: list[str] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except InputError as error:
            problems.extend(str(error).splitlines())
            return None

    attempt(lambda: _check_device(recipe))
    attempt(lambda: check_threads(recipe.benchmark.threads))
    data = attempt(lambda: _open_images(recipe))
    # Without data any class count shows whether the model can be built.
    probe = attempt(lambda: _create(recipe, len(data.class_names) if data else 1000, weights=False))
    config = attempt(lambda: _input_config(recipe, probe)) if probe is not None else None
    if probe is not None:
        attempt(lambda: _check_patterns(recipe, probe))
    if data and probe is not None and recipe.model.checkpoint is not None:
        attempt(
            lambda: load_weights_(
                probe, Path(str(recipe.model.checkpoint)), num_classes=len(data.class_names)
            )
        )
    if problems or data is None or config is None:
        raise InputError("\n".join(dict.fromkeys(problems)))
    model_args = build_arguments(
        recipe.model.name,
        num_classes=len(data.class_names),
        in_chans=recipe.data.in_chans,
        image_size=recipe.data.image_size,
        args=recipe.model.args,
    )
    return _Inputs(data, config, model_args, recipe.cut.ignore)


def _check_device(recipe: Recipe) -> None:
    device, available = recipe.device, {"cpu", "auto"}
    if torch.cuda.is_available():
        available |= {"cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    if torch.backends.mps.is_available():
        available |= {"mps"}
    if device not in available:
        raise InputError(
            f"device must be one of {', '.join(sorted(available))} on this machine, got {device!r}"
        )
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("precision fp16 needs a CUDA device, and this machine has none; use bf16 or no")


def _check_patterns(recipe: Recipe, model: nn.Module) -> None:
    import fnmatch

    names = [name for name, _ in model.named_modules()]
    for pattern in recipe.cut.ignore:
        if not fnmatch.filter(names, pattern):
            raise ModelError(f"cut.ignore: the pattern {pattern!r} matches no module of {recipe.model.name}")


def _open_images(recipe: Recipe) -> ImageData:
    spec = recipe.data
    return open_data(
        spec.name,
        root=spec.root,
        train=spec.train,
        validation=spec.validation,
        test=spec.test,
        validation_share=spec.validation_share,
        test_share=spec.test_share,
        limits=(spec.train_limit, spec.validation_limit, spec.test_limit),
        seed=recipe.seed,
    )


def _create(recipe: Recipe, num_classes: int, *, weights: bool) -> nn.Module:
    """The recipe's model, with the weights it names or random ones drawn from the recipe's seed."""
    seed_everything(recipe.seed, "model", 0)
    return create_model(
        recipe.model.name,
        num_classes=num_classes,
        in_chans=recipe.data.in_chans,
        pretrained=recipe.model.pretrained and weights,
        checkpoint=recipe.model.checkpoint if weights else None,
        image_size=recipe.data.image_size,
        args=recipe.model.args,
    )


def _input_config(recipe: Recipe, model: nn.Module) -> InputConfig:
    spec = recipe.data
    return input_config(
        model,
        image_size=spec.image_size,
        in_chans=spec.in_chans,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
    )


def _make_accelerator(recipe: Recipe) -> Accelerator:
    if recipe.device.startswith("cuda:"):
        torch.cuda.set_device(recipe.device)
    return Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision)


def _wants_baseline(recipe: Recipe) -> bool:
    """Whether the dense model is trained on for as long as the pruned one: by default if it starts from scratch."""
    if recipe.dense.baseline is not None:
        return recipe.dense.baseline
    return not recipe.model.pretrained and recipe.model.checkpoint is None


# ----------------------------------------------------------------------------------------------- the stages


def _train_dense(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train from scratch or from the given weights (no epochs: only take them); note what the data are."""
    model = _create(run.recipe, len(run.inputs.data.class_names), weights=True)
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
        **({} if _wants_baseline(run.recipe) else _dense_figures(run, model)),
    }


def _sparsify(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train with the penalty until channels are exactly zero."""
    spec = run.recipe.sparsify
    model = _with_weights(run, "dense")
    groups = _groups(run, model)
    if spec.epochs:
        options = _options(run.recipe, spec)
        sparsifier = Sparsifier(
            model,
            groups,
            penalty=spec.penalty,
            strength=spec.strength,
            total_steps=spec.epochs * steps_per_epoch(_loader(run, run.inputs.data.train, True), options),
            shares=PhaseShares(spec.warmup, spec.ramp, spec.debias),
            target=_target(run.recipe),
            round_to=_round_to(run.recipe),
            min_channels=run.recipe.cut.min_channels,
            adaptive=spec.adaptive,
        )
        _train(run, model, spec, "sparsify", tick, hook=sparsifier)
    _keep_weights(run, model, "sparse")
    zeros = sum(int(dead.sum()) for dead in zero_channels(model, groups).values())
    return {"zero_channels": zeros, "channels": sum(group.n_channels for group in groups.free)}


def _cut(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Scores, masks, plan, surgery, proof. The sparse and the cut model are compared on the test images."""
    model = _with_weights(run, "sparse")
    groups = _groups(run, model)
    spec = run.recipe.cut
    masks = keep_masks(
        model,
        groups,
        method=spec.method,
        threshold=spec.threshold,
        relative=spec.relative,
        target=_target(run.recipe),
        round_to=_round_to(run.recipe),
        min_channels=spec.min_channels,
    )
    plan = make_plan(groups, masks)
    if not plan.cuts:
        raise InputError(
            f"cut: nothing to remove. No multiple of {_round_to(run.recipe)} channels is zero or below the threshold "
            "in any group; set cut.target, raise sparsify.strength, or lower cut.round_to"
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
        "removed": sum(int((~mask).sum()) for mask in masks.values()),
        "removed_live": live,
        "layers": [
            {
                "name": group.name,
                "channels": group.n_channels,
                "kept": int(masks[group.name].sum()) if group.name in masks else group.n_channels,
                "reason": group.frozen,
            }
            for group in groups
        ],
    }


def _finetune(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Train the cut model without penalty, then save it as the portable artifact and test it once."""
    spec = run.recipe.finetune
    cut = run.files.checkpoints / "cut"
    model = artifact.load(cut).to(run.accelerator.device)
    teacher = None
    if spec.distill is not None and spec.epochs:
        teacher = Distillation(_with_weights(run, "dense"), spec.distill.weight, spec.distill.temperature)
    _train(run, model, spec, "finetune", tick, teacher=teacher)
    accuracy = evaluate(model, _loader(run, run.inputs.data.test, False), run.accelerator).accuracy
    round_trip = 0.0
    if run.files.writes:
        plan = PrunePlan.from_json(artifact.read_structure(cut)["plan"])
        info = {"test_accuracy": accuracy, "recipe": dump_recipe(run.recipe)}
        _save_artifact(run, model, run.files.path / "pruned", plan, info)
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
    """Both models as ONNX files, compared with torch, and their test accuracy through ONNX Runtime."""
    if not run.files.writes:
        return {}
    models = {"dense": _final_dense(run), "pruned": artifact.load(run.files.path / "pruned")}
    return {name: _export_one(run, name, model) for name, model in models.items()}


def _export_one(run: _Run, name: str, model: nn.Module) -> dict[str, Any]:
    spec = run.recipe.export
    path = run.files.path / f"{name}.onnx"
    accuracy = _accuracies(run.files)[name]
    example = torch.zeros(spec.batch_size, *run.inputs.config.input_size)
    write = partial(export_onnx, model.cpu(), opset=spec.opset, metadata=_metadata(run, accuracy))
    write(path, example)
    if spec.dynamic_batch:
        write(run.files.path / f"{name}.dynamic.onnx", example, dynamic_batch=True)
    parity = check_parity(model, path, _validation_images(run).cpu())
    test = _loader(run, run.inputs.data.test, False)
    return {
        "parity": asdict(parity),
        "accuracy_onnx": onnx_accuracy(path, test, threads=run.recipe.benchmark.threads),
        "onnx_bytes": path.stat().st_size,
    }


def _benchmark(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    """Latency of dense and pruned model in ONNX Runtime, interleaved."""
    if not run.files.writes:
        return {}
    spec = run.recipe.benchmark
    paths = [run.files.path / "dense.onnx", run.files.path / "pruned.onnx"]
    compared = compare_latency(
        paths, threads=spec.threads, rounds=spec.rounds, warmup=spec.warmup, seed=run.recipe.seed
    )
    if not compared.trustworthy:
        run.say(f"benchmark: not trustworthy: {compared.reason}")
    return {"latency": compared.to_json(), "machine": describe_machine(), "versions": library_versions()}


def _report(run: _Run, tick: Callable[[], None]) -> dict[str, Any]:
    if run.files.writes:
        _write_report(run.files.path)
    return {}


# -------------------------------------------------------------------------------------- what the stages share

PhaseSpec = DenseSpec | SparsifySpec | FinetuneSpec


def _options(recipe: Recipe, phase: PhaseSpec) -> TrainOptions:
    """The training section, with what the phase overrides."""
    shared = recipe.training.model_dump()
    own = {
        key: getattr(phase, key)
        for key in ("lr", "warmup_epochs", "schedule")
        if getattr(phase, key) is not None
    }
    return TrainOptions(epochs=phase.epochs, **{**shared, **own})


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
    """One phase of training, resumed from its state file; the file goes away when the phase is done."""
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
        _options(run.recipe, phase),
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
        augment=_augment(run.recipe) if training else None,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def _augment(recipe: Recipe) -> Augment | None:
    spec = recipe.data.augment
    if spec is None:
        return None
    return Augment(**{**spec.model_dump(), "color_jitter": spec.color_jitter or 0.0})


def _groups(run: _Run, model: nn.Module) -> ChannelGroups:
    return find_groups(model, run.example, ignore=run.inputs.groups_ignored)


def _target(recipe: Recipe) -> dict[Quantity, float] | None:
    if recipe.cut.target is None:
        return None
    quantities: tuple[Quantity, ...] = ("macs", "params", "channels")
    return {q: value for q in quantities if (value := getattr(recipe.cut.target, q)) is not None}


def _round_to(recipe: Recipe) -> int:
    return channel_multiple() if recipe.cut.round_to == "auto" else recipe.cut.round_to


def _keep_weights(run: _Run, model: nn.Module, name: str) -> None:
    if run.files.writes:
        save_weights(model, run.files.checkpoints / f"{name}.safetensors")
    run.accelerator.wait_for_everyone()


def _with_weights(run: _Run, name: str) -> nn.Module:
    """A dense model on the device, with the weights an earlier stage kept."""
    num_classes = len(run.inputs.data.class_names)
    model = _create(run.recipe, num_classes, weights=False)
    load_weights_(model, run.files.checkpoints / f"{name}.safetensors", num_classes=num_classes)
    return model.to(run.accelerator.device)


def _final_dense(run: _Run) -> nn.Module:
    return _with_weights(run, "baseline" if _wants_baseline(run.recipe) else "dense")


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
        info={"class_names": list(run.inputs.data.class_names), **asdict(run.inputs.config), **info},
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
    with evaluating(sparse), evaluating(pruned):
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


def _metadata(run: _Run, accuracy: float) -> dict[str, str]:
    """What the ONNX file says about itself: enough to feed it and to know where it comes from."""
    config = run.inputs.config
    return {
        "model": run.recipe.model.name,
        "class_names": json.dumps(list(run.inputs.data.class_names)),
        "input_size": json.dumps(list(config.input_size)),
        "mean": json.dumps(list(config.mean)),
        "std": json.dumps(list(config.std)),
        "interpolation": config.interpolation,
        "crop_pct": str(config.crop_pct),
        "test_accuracy": str(accuracy),
        "recipe": dump_recipe(run.recipe),
        "versions": json.dumps(library_versions()),
    }


# --------------------------------------------------------------------------------------------------- reporting


def _accuracies(files: RunDirectory) -> dict[str, float]:
    dense = "baseline" if "baseline" in files.stages else "dense"
    return {"dense": files.result(dense)["accuracy"], "pruned": files.result("finetune")["accuracy"]}


def build_report(directory: Path) -> RunReport:
    """The report of the finished run in `directory`, from its journal, metrics and recipe.

    Raises FileError if it holds no run or one whose stages up to the benchmark are not all done.
    """
    files = RunDirectory(directory, writes=False)
    files.open(resume=True)
    recipe = load_recipe(directory / "recipe.yaml")
    needed = ("dense", "sparsify", "cut", "finetune", "export", "benchmark")
    open_stages = [name for name in needed if name not in files.stages or files.stages[name].status != "done"]
    if open_stages:
        raise FileError(
            f"the run in {directory} is not finished (open: {', '.join(open_stages)}); go on with --resume"
        )
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
            "curves": files.metrics,
            "warnings": _warnings(recipe, files),
        }
    )


def _figures(
    trained: Mapping[str, Any], exported: Mapping[str, Any], latency: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **{key: trained[key] for key in ("accuracy", "params", "macs")},
        **{key: exported[key] for key in ("onnx_bytes", "accuracy_onnx")},
        "latency_ms": {"median": latency["median_ms"], "p10": latency["p10_ms"], "p90": latency["p90_ms"]},
    }


def _warnings(recipe: Recipe, files: RunDirectory) -> list[str]:
    """What a reader should know before trusting the figures."""
    found = []
    cut = files.result("cut")
    if cut["removed_live"]:
        found.append(
            f"{cut['removed_live']} of the {cut['removed']} channels removed were not zero: the cut was not lossless."
        )
    if files.result("dense")["data"]["test"] < 1000:
        n = files.result("dense")["data"]["test"]
        found.append(f"The test set has {n} images: one image is {1 / n:.4f} of accuracy.")
    return found


def _write_report(directory: Path) -> RunReport:
    report = build_report(directory)
    write_json(report, directory / "report.json")
    write_html(report, directory / "report.html")
    return report


# ----------------------------------------------------------------------------- the other commands of the line


def report_again(run: Path) -> RunReport:
    """Write report.json and report.html of a finished run again."""
    return _write_report(run)


def inspect_model(name: str, *, image_size: int | None, recipe: Recipe | None) -> Inspection:
    """Groups of a timm model, or of a recipe's model with its ignore patterns and input size."""
    args = recipe.model.args if recipe else None
    size = image_size or (recipe.data.image_size if recipe else None)
    in_chans = recipe.data.in_chans if recipe else 3
    model = create_model(name, num_classes=1000, in_chans=in_chans, image_size=size, args=args)
    config = input_config(model, image_size=size, in_chans=in_chans)
    ignore = recipe.cut.ignore if recipe else ()
    return inspect_module(name, model, torch.zeros(1, *config.input_size), ignore)


def export_again(
    source: Path, *, output: Path | None, opset: int | None, batch_size: int | None, dynamic_batch: bool
) -> Path:
    """Export the artifact in `source`, or in the run directory `source`, as ONNX; returns the file.

    Default file: pruned.onnx beside the artifact. The metadata of an existing pruned.onnx of the run carry over.
    """
    folder = source if (source / "structure.json").exists() else source / "pruned"
    if not (folder / "structure.json").exists():
        raise FileError(
            f"{source} holds no artifact: neither structure.json nor pruned/structure.json is there"
        )
    info = artifact.read_structure(folder).get("info", {})
    if "input_size" not in info:
        raise FileError(
            f"{folder}/structure.json does not say the input size; export with sparsekit.export_onnx"
        )
    earlier = folder.parent / "pruned.onnx"
    metadata = (
        read_metadata(earlier)
        if earlier.exists()
        else {key: value if isinstance(value, str) else json.dumps(value) for key, value in info.items()}
    )
    target = output or folder.parent / "pruned.onnx"
    example = torch.zeros(batch_size or 1, *info["input_size"])
    model = artifact.load(folder)
    return export_onnx(model, target, example, opset=opset, dynamic_batch=dynamic_batch, metadata=metadata)
