"""A recipe as plain arguments: what follows from its sections, worked out once, and what is built of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import nn

from sparsekit.options import Quantity
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import DataSpec, DenseSpec, FinetuneSpec, SparsifySpec, TargetSpec
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.sparsify.sparsifier import Sparsifier
from sparsekit.sparsify.strength import AutoStrength, ConstantStrength
from sparsekit.structure.groups import ChannelGroups
from sparsekit.training.loader import Augment
from sparsekit.training.models import InputConfig, create_model, input_config
from sparsekit.training.options import TrainOptions
from sparsekit.training.seeding import seed_everything


@dataclass(frozen=True)
class Target:
    """What the cut is to reach, and so how its channels are chosen.

    `limits` are shares of the dense model to keep at most. Nothing is set where the recipe has no target.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    limits: Mapping[Quantity, float] = field(default_factory=dict)
    max_accuracy_drop: float | None = None

    @staticmethod
    def of(spec: TargetSpec | None) -> Target:
        """The target that a recipe asks for."""
        if spec is None:
            return Target()
        shares = {q: share for q in get_args(Quantity) if (share := getattr(spec, q, None)) is not None}
        return Target(spec.speedup, spec.latency_ms, shares, spec.max_accuracy_drop)

    @property
    def is_speed(self) -> bool:
        """Whether it names a speed-up or a latency, which have to be measured."""
        return self.speedup is not None or self.latency_ms is not None

    @property
    def takes_attempts(self) -> bool:
        """Whether it is the fastest model within a budget of accuracy, which takes several attempts to find."""
        return self.max_accuracy_drop is not None

    @property
    def takes_knapsack(self) -> bool:
        """Whether masks are chosen as a whole, by the knapsack; for one share alone a threshold does."""
        return self.is_speed or self.takes_attempts or len(self.limits) > 1

    @property
    def share(self) -> Mapping[Quantity, float] | None:
        """The one share that a threshold is found for; None if there is none, or the knapsack chooses."""
        return None if self.takes_knapsack else self.limits or None

    @property
    def besides_accuracy(self) -> dict[str, float]:
        """What it asks for besides the accuracy, by the recipe's keys."""
        speeds = {"speedup": self.speedup, "latency_ms": self.latency_ms}
        return {key: value for key, value in speeds.items() if value is not None} | {**self.limits}


@dataclass(frozen=True)
class Phases:
    """How each phase trains: the recipe's section `training`, with what the phase overrides."""

    dense: TrainOptions
    sparsify: TrainOptions
    finetune: TrainOptions


@dataclass(frozen=True)
class Arguments:
    """What follows from a recipe's sections.

    `grouping` are the arguments of `find_groups`; `augment` is None for no augmentation. `trains_baseline`: the dense
    model is trained on for as long as the pruned one, by default unless it is finished from the start (no epochs of its
    own).
    """

    phases: Phases
    augment: Augment | None
    grouping: Mapping[str, Any]
    target: Target
    trains_baseline: bool

    @staticmethod
    def of(recipe: Recipe) -> Arguments:
        """The arguments of a recipe."""
        cut, dense = recipe.cut, recipe.dense
        return Arguments(
            phases=Phases(
                *(_train_options(recipe, phase) for phase in (dense, recipe.sparsify, recipe.finetune))
            ),
            augment=_augmentation(recipe.data),
            grouping={
                "ignore": cut.ignore,
                "through_layer_norm": cut.through_layer_norm,
                "blocks": cut.blocks,
                "round_to": cut.round_to,
                "min_channels": cut.min_channels,
            },
            target=Target.of(cut.target),
            trains_baseline=dense.epochs > 0 if dense.baseline is None else dense.baseline,
        )


def make_sparsifier(
    recipe: Recipe,
    model: nn.Module,
    groups: ChannelGroups,
    *,
    total_steps: int,
    costs: Mapping[str, float] | None,
) -> Sparsifier:
    """The hook of the sparsify phase. Raises InputError for a target out of reach or a model with nothing free."""
    spec, target = recipe.sparsify, Target.of(recipe.cut.target)
    shares = PhaseShares(spec.warmup, spec.ramp, spec.debias)
    strength: AutoStrength | ConstantStrength
    if spec.strength == "auto":
        # Masks that are chosen as a whole replace this target when the warm-up is over.
        aim: Mapping[Quantity, float] = {"macs": 1.0} if target.takes_knapsack else target.share or {}
        strength = AutoStrength(aim, total_steps, shares, spec.importance, costs)
    else:
        strength = ConstantStrength(
            spec.strength, total_steps, shares, adaptive=spec.adaptive, costs=costs, revive=spec.revive
        )
    return Sparsifier(model, groups, spec.penalty, strength=strength)


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


def image_config(recipe: Recipe, model: nn.Module) -> InputConfig:
    """How images become the model's inputs: what the recipe says, else timm's for the model."""
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
    """What sees to the recipe's device and precision."""
    if recipe.device.startswith("cuda:"):
        torch.cuda.set_device(recipe.device)
    return Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision)


def _train_options(recipe: Recipe, phase: DenseSpec | SparsifySpec | FinetuneSpec) -> TrainOptions:
    own = {
        key: getattr(phase, key)
        for key in ("lr", "warmup_epochs", "schedule")
        if getattr(phase, key) is not None
    }
    return TrainOptions(epochs=phase.epochs, **{**recipe.training.model_dump(), **own})


def _augmentation(spec: DataSpec) -> Augment | None:
    if spec.augment is None:
        return None
    return Augment(**{**spec.augment.model_dump(), "color_jitter": spec.augment.color_jitter or 0.0})
