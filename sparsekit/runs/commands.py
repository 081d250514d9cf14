"""What the commands inspect, plan, export and report do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sparsekit.artifact.format import read_structure
from sparsekit.artifact.load import load as load_artifact
from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import FileError, InputError
from sparsekit.export.onnx_file import export_onnx, metadata_texts
from sparsekit.finished.forecast import SPEEDS, forecast_with
from sparsekit.finished.targets import Speed, check_reach
from sparsekit.latency.layers import measure_layers
from sparsekit.latency.search import time_masks
from sparsekit.recipe.recipe import Recipe
from sparsekit.report.dry_run import DryRun
from sparsekit.report.inspection import Inspection, inspect_module
from sparsekit.report.schema import RunReport
from sparsekit.runs.arguments import Arguments, Target, build_model, starts_trained
from sparsekit.runs.choosing import cut_importance, search_masks
from sparsekit.runs.rehearsal import Inputs, open_inputs, training_images
from sparsekit.runs.report_assembly import write_report
from sparsekit.selection.importance import output_shares
from sparsekit.selection.keep_masks import keep_masks
from sparsekit.selection.knapsack import Knapsack, choose_channels
from sparsekit.training.models import create_model, input_config, load_weights_
from sparsekit.training.own_models import create_own_model, import_function


def report_again(run: Path) -> RunReport:
    """Write report.json and report.html of the finished run in a directory again."""
    return write_report(run)


def inspect_model(
    name: str,
    *,
    image_size: int | None,
    recipe: Recipe | None,
    through_layer_norm: bool = False,
    blocks: bool = False,
) -> Inspection:
    """Inspect a timm model, or a recipe's model as its data, arguments and section `cut` make it."""
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


def dry_run(recipe: Recipe, *, run: Path | None, console: Console) -> DryRun:
    """Choose channels for the recipe's target and measure the speed-up; trains nothing.

    They are chosen by `cut.importance`; those of a finished model with `cut.repair` by measured loss curves, which
    takes minutes and also tells what several speeds would cost.

    The weights are those of the dense model in the run directory `run`, else those that the recipe starts from. Raises
    InputError for a recipe without a target, FileError for a run that has not trained its dense model.
    """
    target = _reachable_target(recipe)
    inputs = open_inputs(recipe)
    model = _weighted_model(recipe, len(inputs.data.class_names), run)
    trained = run is not None or starts_trained(recipe, len(inputs.data.class_names))
    example = torch.zeros(1, *inputs.config.input_size)
    timed = torch.zeros(recipe.export.batch_size, *inputs.config.input_size)
    threads = recipe.benchmark.threads
    remarks = [] if trained else ["the weights are random: trust how many channels go, not which ones"]
    if target.takes_attempts:
        remarks.append("max_accuracy_drop needs training, so it is left out here")
        target = replace(target, max_accuracy_drop=None)
    if Arguments.of(recipe).finished is not None:
        return _dry_run_with_repair(recipe, target, inputs, model, timed, remarks, console)
    with console.status("measuring"):
        groups = find_groups(model, example, **Arguments.of(recipe).grouping)
        given = cut_importance(recipe, inputs, model, groups)
        importance = output_shares(model, groups) if given is None else given
        measured = measure_layers(model, groups, timed, threads=threads)
        if target.is_speed:
            search = search_masks(
                target,
                model,
                measured,
                importance,
                timed,
                threads=threads,
                say=lambda line: console.print(line, highlight=False),
            )
            masks, found, trials = search.masks, search.found, search.trials
            remarks = [*filter(None, [search.remark]), *remarks]
        else:
            if target.takes_knapsack:
                masks = choose_channels(groups, importance, target.limits)
            else:
                masks = keep_masks(model, groups, method="budget", target=target.share, importance=given)
            found = time_masks(model, measured, masks, timed, threads=threads)
            trials = (found,)
    asked = target.besides_accuracy
    return DryRun(recipe.model.label, asked, measured, masks, found, trials, "; ".join(remarks))


def _dry_run_with_repair(
    recipe: Recipe,
    target: Target,
    inputs: Inputs,
    model: nn.Module,
    timed: Tensor,
    remarks: list[str],
    console: Console,
) -> DryRun:
    """As `dry_run`, for a finished model: by measured loss curves, and with a forecast for several speeds."""
    threads = recipe.benchmark.threads
    options = Arguments.of(recipe).finished
    assert options is not None
    speed = Speed(target.speedup, target.latency_ms)
    found = forecast_with(
        model,
        training_images(recipe, inputs, options.max_images),
        [*SPEEDS, *([target.speedup] if target.speedup else [])],
        options,
        check=lambda groups: check_reach(groups, speed, target.limits),
        console=console,
    )
    with console.status("measuring"):
        if target.is_speed:
            search = search_masks(
                target,
                model,
                found.groups,
                found.known,
                timed,
                threads=threads,
                say=lambda line: console.print(line, highlight=False),
            )
            masks, trial, trials, said = search.masks, search.found, search.trials, search.remark
        else:
            masks = Knapsack(found.groups, found.known).under(target.limits)
            trial = time_masks(model, found.groups, masks, timed, threads=threads)
            trials, said = (trial,), ""
    remark = "; ".join(filter(None, [said, *remarks, found.remark]))
    asked = target.besides_accuracy
    return DryRun(recipe.model.label, asked, found.groups, masks, trial, trials, remark, found.speeds)


def export_again(
    source: Path,
    *,
    output: Path | None,
    opset: int | None,
    batch_size: int | None,
    dynamic_batch: bool,
    merge_groups: bool = True,
    factory: str | None = None,
) -> Path:
    """Export an artifact as ONNX and return the file. `source` is the artifact or a run directory.

    `factory`, as module:function, builds the dense model where that is not timm's. It is called with the arguments that
    the run noted in the artifact. No function is imported because an artifact names it.

    Without `output` the file lies beside the artifact and is named after it and the options: pruned.b8.onnx. Raises
    FileError if that exists, because the files of a run are those that its report measured.
    """
    folder = source if (source / "structure.json").exists() else source / "pruned"
    if not (folder / "structure.json").exists():
        raise FileError(
            f"{source} holds no artifact: neither structure.json nor pruned/structure.json is there"
        )
    structure = read_structure(folder)
    info = structure["info"]
    if factory is None and "factory" in structure["source"]:
        raise FileError(
            f"{folder} holds a {structure['source']['factory']:.80}, which is not a timm model, and no code is run "
            "because an artifact names it; name the function that builds it with --factory module:function"
        )
    size = info.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
        raise FileError(
            f"{folder}/structure.json does not say the input size as [channels, height, width], got {size!r:.40}; "
            "export with sparsekit.export_onnx"
        )
    asked = (
        "dynamic" if dynamic_batch else f"b{batch_size or 1}",
        *([f"opset{opset}"] if opset else []),
        *([] if merge_groups else ["groups"]),
    )
    target = output or folder.parent / ".".join((folder.resolve().name, *asked, "onnx"))
    if output is None and target.exists():
        raise FileError(f"{target} is already there; name another file with --output")
    example = torch.zeros(batch_size or 1, *size)
    model = load_artifact(folder, factory=None if factory is None else _noted_call(factory, info))
    return export_onnx(
        model,
        target,
        example,
        opset=opset,
        dynamic_batch=dynamic_batch,
        merge_groups=merge_groups,
        metadata=metadata_texts(info),
    )


def _noted_call(factory: str, info: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """The call of a person's function with the arguments that a run noted in its artifact; none without a note."""
    noted = info.get("model_args", {})
    if not isinstance(noted, dict):
        raise FileError(f"the artifact's info.model_args must be a mapping, got {noted!r:.60}")
    import_function(factory)  # a mistake in the name is told as such
    return lambda: create_own_model(factory, noted)


def _reachable_target(recipe: Recipe) -> Target:
    """Return the recipe's target. Raises InputError if there is none that can be met without training."""
    if recipe.cut.target is None:
        raise InputError("the recipe has no cut.target to plan for; add --set 'cut.target={speedup: 2}'")
    target = Target.of(recipe.cut.target)
    if not target.besides_accuracy:
        raise InputError(
            "the channels that cut.target.max_accuracy_drop keeps are found by training (sparsekit prune); to plan for "
            "a speed-up, add "
            "--set 'cut.target={speedup: 2}'"
        )
    return target


def _weighted_model(recipe: Recipe, n_classes: int, run: Path | None) -> nn.Module:
    """Build the recipe's model in eval mode, with the dense weights of a run, else those it starts from."""
    model = build_model(recipe, n_classes, weights=run is None).eval()
    if run is not None:
        load_weights_(model, run / "checkpoints" / "dense.safetensors", num_classes=n_classes)
    return model
