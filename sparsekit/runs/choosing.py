"""Which channels a run removes: from the target of its recipe to keep-masks, by importance and measured speed.

One share is met by a threshold (`keep_masks`, or in training the automatic strength itself). A speed, a budget of
accuracy or several shares take masks that are chosen as a whole, by the knapsack: `Target.takes_knapsack` says so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError
from sparsekit.integrations.torch_pruning import importance as importance_by
from sparsekit.latency.layers import measure_layers
from sparsekit.latency.search import SpeedSearch, search_speed
from sparsekit.recipe.recipe import Recipe
from sparsekit.runs.arguments import Target, build_model
from sparsekit.runs.rehearsal import Inputs
from sparsekit.runs.results import ChoiceFound, SparsifyResult
from sparsekit.runs.run import Run, on_cpu
from sparsekit.selection.costs import channel_latencies, channel_macs
from sparsekit.selection.importance import all_alike, output_shares
from sparsekit.selection.keep_masks import keep_masks
from sparsekit.selection.knapsack import Knapsack, choose_channels
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks, Scores
from sparsekit.training.checkpoint import load_state
from sparsekit.training.loader import make_loader


def cut_importance(recipe: Recipe, inputs: Inputs, model: nn.Module, groups: ChannelGroups) -> Scores | None:
    """How important the recipe's criterion says that channels are; None for the norms of their filters.

    "taylor" and "hessian" take the gradients of random training images.
    """
    criterion, images = recipe.cut.importance, inputs.data.train
    if criterion == "magnitude":
        return None
    count = min(recipe.cut.importance_images, len(images))
    chosen = np.random.default_rng(recipe.seed).permutation(len(images))[:count]
    size = recipe.data.eval_batch_size or recipe.data.batch_size
    device = next(model.parameters()).device
    loader = make_loader(images.subset(chosen), inputs.config, training=False, batch_size=size)
    batches = ((batch.to(device), labels.to(device)) for batch, labels in loader)
    return importance_by(model, groups, criterion, batches=batches, seed=recipe.seed)


def check_speed(run: Run) -> tuple[float, float]:
    """Measure how long the layers take, before hours are spent on a target that is met already, or never.

    Returns the milliseconds of the dense model, and how many times as fast it is predicted to be at the fewest
    channels.
    """
    target = run.arguments.target
    model = build_model(run.recipe, len(run.inputs.data.class_names), weights=False)
    groups = _measured(run, model, find_groups(model, run.example.cpu(), **run.arguments.grouping))
    most = 1 / Knapsack(groups, all_alike(groups)).least("latency")
    dense_ms = sum(layer.ms or 0.0 for layer in groups.layers)
    run.say(f"the dense model takes {dense_ms:.3g} ms, and can be made up to about {most:.2g} times as fast")
    if not target.is_speed:
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
    return _measured(run, model, groups) if run.arguments.target.is_speed else groups


def channel_costs(run: Run, model: nn.Module, groups: ChannelGroups) -> dict[str, float] | None:
    """What a channel of each group costs, where the recipe weighs importance by that; None where it does not."""
    weighed = run.recipe.sparsify.weigh_by
    if weighed == "size" or run.arguments.target.takes_knapsack:
        return None
    return channel_macs(groups) if weighed == "macs" else channel_latencies(_measured(run, model, groups))


def cut_masks(run: Run, model: nn.Module, groups: ChannelGroups) -> tuple[Masks, ChoiceFound | None]:
    """Keep-masks, and how they were chosen if they were chosen as a whole: in training already, or here."""
    spec, target = run.recipe.cut, run.arguments.target
    settled = run.files.checkpoints / "settled.safetensors"
    if target.takes_knapsack and settled.exists():
        return load_state(settled), run.files.result("sparsify", SparsifyResult).choice
    importance = cut_importance(run.recipe, run.inputs, model, groups)
    if target.takes_knapsack:
        ranked = output_shares(model, groups) if importance is None else importance
        return choose_masks(run, model, with_latencies(run, model, groups), ranked)
    masks = keep_masks(
        model,
        groups,
        method=spec.method,
        threshold=spec.threshold,
        relative=spec.relative,
        target=target.share,
        importance=importance,
    )
    return masks, None


def choose_masks(
    run: Run, model: nn.Module, groups: ChannelGroups, importance: Scores
) -> tuple[Masks, ChoiceFound]:
    """Masks for a target that takes them as a whole, by the first process, and how they were found."""

    def choose() -> tuple[Masks, ChoiceFound]:
        target, threads = run.arguments.target, run.recipe.benchmark.threads
        multiples = {group.name: group.rounding.multiple for group in groups.free}
        if not target.is_speed:
            return choose_channels(groups, importance, target.limits), ChoiceFound(multiples)
        search = search_masks(
            target, on_cpu(model), groups, importance, run.timed_example, threads=threads, say=run.say
        )
        return search.masks, ChoiceFound(multiples, search.asked, search.found, search.trials, search.remark)

    return run.by_the_first(choose)


def search_masks(
    target: Target,
    model: nn.Module,
    groups: ChannelGroups,
    importance: Scores,
    example: Tensor,
    *,
    threads: int,
    say: Callable[[str], None],
) -> SpeedSearch:
    """Masks for a target that is a speed; every trial is told."""
    return search_speed(
        model,
        groups,
        importance,
        example,
        speedup=target.speedup,
        latency_ms=target.latency_ms,
        limits=target.limits,
        threads=threads,
        progress=lambda trial: say(
            f"choice: predicted to be {trial.predicted:.3g} times as fast, measured {trial.measured:.3g}"
        ),
    )


def _measured(run: Run, model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    threads, example = run.recipe.benchmark.threads, run.timed_example
    return run.by_the_first(lambda: measure_layers(on_cpu(model), groups, example, threads=threads))
