"""Which channels a run removes: from the target of its recipe to keep-masks, by worth and measured speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError
from sparsekit.latency.layers import measure_layers
from sparsekit.latency.search import SpeedSearch, search_speed
from sparsekit.recipe.recipe import Recipe
from sparsekit.runs.arguments import (
    build_model,
    channel_rounding,
    cut_target,
    group_options,
    group_rounding,
    kept_limits,
    wants_choice,
    wants_speed,
)
from sparsekit.runs.run import Run, on_cpu
from sparsekit.selection.costs import channel_latencies, channel_macs
from sparsekit.selection.importance import channel_worth
from sparsekit.selection.keep_masks import keep_masks
from sparsekit.selection.knapsack import Choice, choose_channels
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks
from sparsekit.training.checkpoint import load_state


def check_speed(run: Run) -> tuple[float, float]:
    """Measure how long the layers take, before hours are spent on a target that is met already, or never.

    Returns the milliseconds of the dense model, and how many times as fast it is predicted to be at the fewest
    channels.
    """
    target = run.recipe.cut.target
    assert target is not None
    model = build_model(run.recipe, len(run.inputs.data.class_names), weights=False)
    groups = _measured(run, model, find_groups(model, run.example.cpu(), **group_options(run.recipe)))
    worth = {group.name: torch.ones(group.n_channels) for group in groups.free}
    most = 1 / Choice(groups, worth, group_rounding(run.recipe, groups)).least("latency")
    dense_ms = sum(layer.ms or 0.0 for layer in groups.layers)
    run.say(f"the dense model takes {dense_ms:.3g} ms, and can be made up to about {most:.2g} times as fast")
    if not wants_speed(run.recipe):
        return dense_ms, most
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
    return dense_ms, most


def with_latencies(run: Run, model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    """Groups whose layers are measured if the target is a speed; by the first process, so that all agree."""
    return _measured(run, model, groups) if wants_speed(run.recipe) else groups


def _measured(run: Run, model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    threads, example = run.recipe.benchmark.threads, run.timed_example
    return run.by_the_first(lambda: measure_layers(on_cpu(model), groups, example, threads=threads))


def channel_costs(run: Run, model: nn.Module, groups: ChannelGroups) -> dict[str, float] | None:
    """What a channel of each group costs; measured by the first process, so that all agree."""
    recipe = run.recipe
    if recipe.sparsify.weigh_by == "size" or wants_choice(recipe):
        return None
    if recipe.sparsify.weigh_by == "macs":
        return channel_macs(groups)
    threads, example = recipe.benchmark.threads, run.timed_example

    def measure() -> dict[str, float]:
        return channel_latencies(measure_layers(on_cpu(model), groups, example, threads=threads))

    return run.by_the_first(measure)


def cut_masks(run: Run, model: nn.Module, groups: ChannelGroups) -> tuple[Masks, dict[str, Any]]:
    """Keep-masks, and notes on how they were chosen: in training already, or here, where the target is more than one
    share.
    """
    spec = run.recipe.cut
    settled = run.files.checkpoints / "settled.safetensors"
    if wants_choice(run.recipe) and spec.method in ("auto", "budget"):
        if settled.exists():
            return load_state(settled), run.files.result("sparsify")["choice"]
        return choose_masks(run, model, with_latencies(run, model, groups), channel_worth(model, groups))
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


def choose_masks(
    run: Run, model: nn.Module, groups: ChannelGroups, worth: Masks
) -> tuple[Masks, dict[str, Any]]:
    """Masks for the target, and notes on how they were found."""

    def choose() -> tuple[Masks, dict[str, Any]]:
        rounding = group_rounding(run.recipe, groups)
        multiples = {name: multiple for name, (multiple, _) in rounding.items()}
        if not wants_speed(run.recipe):
            masks = choose_channels(groups, worth, kept_limits(run.recipe), rounding)
            return masks, {"multiples": multiples}
        search = search_masks(run.recipe, on_cpu(model), groups, worth, run.timed_example, run.say)
        notes = {"asked": search.asked, "remark": search.remark, "found": asdict(search.found)}
        trials = [asdict(trial) for trial in search.trials]
        return search.masks, notes | {"trials": trials, "multiples": multiples}

    return run.by_the_first(choose)


def search_masks(
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
