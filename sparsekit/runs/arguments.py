"""The sections of a recipe as plain arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from sparsekit.latency.search import block_rounding
from sparsekit.machine import channel_multiple
from sparsekit.options import Quantity
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import DenseSpec, FinetuneSpec, SparsifySpec
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.sparsify.sparsifier import Sparsifier
from sparsekit.structure.groups import ChannelGroups
from sparsekit.training.loader import Augment
from sparsekit.training.models import InputConfig, create_model, input_config
from sparsekit.training.options import TrainOptions
from sparsekit.training.seeding import seed_everything


def make_sparsifier(
    recipe: Recipe,
    model: nn.Module,
    groups: ChannelGroups,
    *,
    total_steps: int,
    costs: Mapping[str, float] | None,
) -> Sparsifier:
    """The hook of the sparsify phase. Raises InputError for a target out of reach or a model with nothing free."""
    spec = recipe.sparsify
    return Sparsifier(
        model,
        groups,
        penalty=spec.penalty,
        strength=spec.strength,
        total_steps=total_steps,
        shares=PhaseShares(spec.warmup, spec.ramp, spec.debias),
        # Masks that are chosen as a whole replace this target when the warm-up is over.
        target={"macs": 1.0} if wants_choice(recipe) else cut_target(recipe),
        round_to=channel_rounding(recipe),
        min_channels=recipe.cut.min_channels,
        adaptive=spec.adaptive,
        importance=spec.importance,
        costs=costs,
        revive=spec.revive,
    )


def build_model(recipe: Recipe, num_classes: int, *, weights: bool) -> nn.Module:
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


def recipe_input_config(recipe: Recipe, model: nn.Module) -> InputConfig:
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


def make_accelerator(recipe: Recipe) -> Accelerator:
    if recipe.device.startswith("cuda:"):
        torch.cuda.set_device(recipe.device)
    return Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision)


def wants_baseline(recipe: Recipe) -> bool:
    """Whether the dense model is trained on for as long as the pruned one: by default unless it is finished
    from the start (no epochs of its own)."""
    if recipe.dense.baseline is not None:
        return recipe.dense.baseline
    return recipe.dense.epochs > 0


PhaseSpec = DenseSpec | SparsifySpec | FinetuneSpec


def train_options(recipe: Recipe, phase: PhaseSpec) -> TrainOptions:
    """The training section, with what the phase overrides."""
    shared = recipe.training.model_dump()
    own = {
        key: getattr(phase, key)
        for key in ("lr", "warmup_epochs", "schedule")
        if getattr(phase, key) is not None
    }
    return TrainOptions(epochs=phase.epochs, **{**shared, **own})


def augmentation(recipe: Recipe) -> Augment | None:
    spec = recipe.data.augment
    if spec is None:
        return None
    return Augment(**{**spec.model_dump(), "color_jitter": spec.color_jitter or 0.0})


def group_options(recipe: Recipe) -> dict[str, Any]:
    """What `find_groups` is told of the cut."""
    cut = recipe.cut
    return {
        "ignore": cut.ignore,
        "through_layer_norm": cut.through_layer_norm,
        "blocks": cut.blocks,
    }


def kept_limits(recipe: Recipe) -> dict[Quantity, float]:
    """The shares of the dense model that the target leaves at most."""
    quantities: tuple[Quantity, ...] = ("macs", "params", "channels")
    return {q: value for q in quantities if (value := getattr(recipe.cut.target, q, None)) is not None}


def wants_speed(recipe: Recipe) -> bool:
    """Whether the target names a speed-up or a latency."""
    target = recipe.cut.target
    return target is not None and (target.speedup is not None or target.latency_ms is not None)


def wants_attempts(recipe: Recipe) -> bool:
    """Whether the target is the fastest model within a budget of accuracy, which takes several attempts to find."""
    target = recipe.cut.target
    return target is not None and target.max_accuracy_drop is not None


def wants_choice(recipe: Recipe) -> bool:
    """Whether the target takes more than a threshold over one quantity: masks that are chosen as a whole."""
    return wants_speed(recipe) or wants_attempts(recipe) or len(kept_limits(recipe)) > 1


def cut_target(recipe: Recipe) -> dict[Quantity, float] | None:
    """The target as one quantity's share; None if there is none, or masks are chosen as a whole."""
    return None if wants_choice(recipe) else kept_limits(recipe) or None


def group_rounding(recipe: Recipe, groups: ChannelGroups) -> dict[str, tuple[int, int]]:
    """In multiples of how many channels each free group is cut, and how many stay: measured, where the layers were."""
    if recipe.cut.round_to == "auto" and all(layer.curve is not None for layer in groups.layers):
        return block_rounding(groups, recipe.cut.min_channels)
    return {g.name: g.rounding(channel_rounding(recipe), recipe.cut.min_channels) for g in groups.free}


def channel_rounding(recipe: Recipe) -> int:
    return channel_multiple() if recipe.cut.round_to == "auto" else recipe.cut.round_to
