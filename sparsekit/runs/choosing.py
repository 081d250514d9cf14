"""Which channels a run removes: keep-masks for the target of its recipe, by importance and measured latency.

One share is met by a threshold, in `keep_masks` or by the automatic strength in training. For a speed-up, a latency, a
budget of accuracy or several shares the knapsack chooses the masks of all groups together (`Target.takes_knapsack`).
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError
from sparsekit.finished.choice import Known
from sparsekit.finished.display import StepDisplay
from sparsekit.finished.preparation import measure_curves, prepare
from sparsekit.integrations.torch_pruning import importance as importance_by
from sparsekit.latency.layers import measure_layers
from sparsekit.latency.search import SpeedSearch, search_speed
from sparsekit.recipe.recipe import Recipe
from sparsekit.runs.arguments import Target, build_model
from sparsekit.runs.rehearsal import Inputs, some_of_training, training_images
from sparsekit.runs.results import ChoiceFound, SparsifyResult
from sparsekit.runs.run import Run, bare_copy
from sparsekit.selection.costs import channel_latencies, channel_macs
from sparsekit.selection.importance import all_alike, output_shares, zero_channels
from sparsekit.selection.keep_masks import keep_masks
from sparsekit.selection.knapsack import Knapsack
from sparsekit.selection.loss_curves import LossCurve
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.masks import Masks, Scores
from sparsekit.training.checkpoint import load_state

# Training images that loss curves are measured on, or fewer; as many as `sparsekit.prune` reads.
_CURVE_IMAGES = 512


def cut_importance(recipe: Recipe, inputs: Inputs, model: nn.Module, groups: ChannelGroups) -> Scores | None:
    """Compute the importance of channels by the recipe's criterion; None for the norms of their filters.

    "taylor" and "hessian" take the gradients of random training images.
    """
    criterion = recipe.cut.importance
    if criterion == "magnitude":
        return None
    assert criterion != "lasso", "no recipe has it without cut.repair, which ranks by itself"
    device = next(model.parameters()).device
    loader = some_of_training(recipe, inputs, recipe.cut.importance_images)
    batches = ((batch.to(device), labels.to(device)) for batch, labels in loader)
    found = importance_by(model, groups, criterion, batches=batches, seed=recipe.seed)
    # A channel that the penalty took to zero goes first, whatever its filter is.
    return {name: found[name].masked_fill(dead, 0.0) for name, dead in zero_channels(model, groups).items()}


def check_speed(run: Run) -> tuple[float, float]:
    """Measure the layers before anything is trained; returns the dense latency in ms and the largest speed-up.

    The speed-up is predicted for the fewest channels allowed. Raises InputError for a target that is met already or out
    of reach.
    """
    target = run.arguments.target
    model = build_model(run.recipe, len(run.inputs.data.class_names), weights=False)
    groups = _measured(run, model, find_groups(model, run.example.cpu(), **run.arguments.grouping))
    most = 1 / Knapsack(groups, all_alike(groups)).least("latency")
    dense_ms = sum(layer.ms or 0.0 for layer in groups.layers)
    run.say(
        f"the dense model takes {dense_ms:.3g} ms; the largest speed-up is predicted to be about {most:.2g}"
    )
    if not target.is_speed:
        return dense_ms, most
    asked = target.speedup or dense_ms / (target.latency_ms or dense_ms)
    if asked <= 1:
        raise InputError(
            f"cut.target.latency_ms {target.latency_ms:g} is met already: the dense model takes {dense_ms:.3g} ms in "
            "ONNX Runtime; ask for less, or leave it out"
        )
    # Predictions are a few per cent off, so only a speed-up far beyond is refused.
    if asked > 1.1 * most:
        raise InputError(
            f"cut.target asks for a speed-up of {asked:.3g}, and with the fewest channels allowed it is predicted to "
            f"be about {most:.3g}; ask for less, lower cut.min_channels, or free more with "
            "cut.through_layer_norm or cut.blocks"
        )
    return dense_ms, most


def with_latencies(run: Run, model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    """Return the groups, with measured layers if the target is a speed-up or a latency."""
    return _measured(run, model, groups) if run.arguments.target.is_speed else groups


def channel_costs(run: Run, model: nn.Module, groups: ChannelGroups) -> dict[str, float] | None:
    """Return the cost of one channel of each group; None where the recipe does not weigh importance by cost."""
    weighed = run.recipe.sparsify.weigh_by
    if weighed == "size" or run.arguments.target.takes_knapsack:
        return None
    return channel_macs(groups) if weighed == "macs" else channel_latencies(_measured(run, model, groups))


def cut_masks(run: Run, model: nn.Module, groups: ChannelGroups) -> tuple[Masks, ChoiceFound | None]:
    """Return the keep-masks of the cut and, if the knapsack chose them (in training or here), how."""
    spec, target = run.recipe.cut, run.arguments.target
    settled = run.files.checkpoints / "settled.safetensors"
    if target.takes_knapsack and settled.exists():
        return load_state(settled), run.files.result("sparsify", SparsifyResult).choice
    importance = run.by_the_first(lambda: cut_importance(run.recipe, run.inputs, model, groups))
    if target.takes_knapsack:
        importance = output_shares(model, groups) if importance is None else importance
        return choose_masks(run, model, with_latencies(run, model, groups), importance)
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


def measured_curves(run: Run, model: nn.Module, groups: ChannelGroups, importance: Scores) -> Known:
    """Measure the loss curve of each group on training images, without labels, in the first process for all.

    Groups whose importance is infinite keep it: they stay. It can be called in the middle of a phase, whose model and
    display it leaves alone.
    """

    def measure() -> dict[str, LossCurve | Tensor]:
        images = training_images(run.recipe, run.inputs, _CURVE_IMAGES)
        with StepDisplay(Console(quiet=True)) as show:
            prepared = prepare(bare_copy(model), groups, images, show, seed=run.recipe.seed)
            return measure_curves(prepared, show)

    run.say(f"choice: measuring the loss curves of {len(groups.free)} groups")
    curves = run.by_the_first(measure)
    return {
        name: curves[name] if bool(scores.isfinite().all()) else scores for name, scores in importance.items()
    }


def choose_masks(
    run: Run, model: nn.Module, groups: ChannelGroups, known: Known
) -> tuple[Masks, ChoiceFound]:
    """Choose masks by the knapsack, in the first process for all; returns how they were found as well."""

    def choose() -> tuple[Masks, ChoiceFound]:
        target, threads = run.arguments.target, run.recipe.benchmark.threads
        multiples = {group.name: group.rounding.multiple for group in groups.free}
        if not target.is_speed:
            return Knapsack(groups, known).under(target.limits), ChoiceFound(multiples)
        search = search_masks(
            target, bare_copy(model).cpu(), groups, known, run.timed_example, threads=threads, say=run.say
        )
        return search.masks, ChoiceFound(multiples, search.asked, search.found, search.trials, search.remark)

    return run.by_the_first(choose)


def search_masks(
    target: Target,
    model: nn.Module,
    groups: ChannelGroups,
    known: Known,
    example: Tensor,
    *,
    threads: int,
    say: Callable[[str], None],
) -> SpeedSearch:
    """Find masks for a speed-up or a latency. `say` is told every trial."""
    return search_speed(
        model,
        groups,
        known,
        example,
        speedup=target.speedup,
        latency_ms=target.latency_ms,
        limits=target.limits,
        threads=threads,
        progress=lambda trial: say(
            f"choice: predicted a speed-up of {trial.predicted:.3g}, measured {trial.measured:.3g}"
        ),
    )


def _measured(run: Run, model: nn.Module, groups: ChannelGroups) -> ChannelGroups:
    """Measure the layers in the first process for all, because times differ."""
    threads, example = run.recipe.benchmark.threads, run.timed_example
    return run.by_the_first(lambda: measure_layers(bare_copy(model).cpu(), groups, example, threads=threads))
