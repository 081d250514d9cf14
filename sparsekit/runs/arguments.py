"""A recipe as plain arguments, worked out once, and the objects that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from sparsekit.errors import ModelError
from sparsekit.finished.preparation import Options
from sparsekit.options import LearnedImportance, Quantity
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import DataSpec, DenseSpec, FinetuneSpec, SparsifySpec, TargetSpec
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.sparsify.sparsifier import Sparsifier
from sparsekit.sparsify.strength import AutoStrength, ConstantStrength
from sparsekit.structure.groups import ChannelGroups
from sparsekit.training.loader import Augment
from sparsekit.training.models import (
    InputConfig,
    build_arguments,
    check_arguments,
    check_name,
    create_model,
    input_config,
    load_weights_,
)
from sparsekit.training.options import TrainOptions
from sparsekit.training.own_models import call_arguments, create_own_model, import_function
from sparsekit.training.seeding import seed_everything


@dataclass(frozen=True)
class Target:
    """What the cut has to reach. It decides how channels are chosen.

    `limits` are the shares of the dense model to keep at most. Nothing is set where the recipe has no target.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    limits: Mapping[Quantity, float] = field(default_factory=dict)
    max_accuracy_drop: float | None = None

    @staticmethod
    def of(spec: TargetSpec | None) -> Target:
        """Make the target of the recipe's section `cut.target`."""
        if spec is None:
            return Target()
        shares = {q: share for q in get_args(Quantity) if (share := getattr(spec, q, None)) is not None}
        return Target(spec.speedup, spec.latency_ms, shares, spec.max_accuracy_drop)

    @property
    def is_speed(self) -> bool:
        """Whether it names a speed-up or a latency, which has to be measured."""
        return self.speedup is not None or self.latency_ms is not None

    @property
    def takes_attempts(self) -> bool:
        """Whether it is a budget of accuracy, which takes several attempts."""
        return self.max_accuracy_drop is not None

    @property
    def takes_knapsack(self) -> bool:
        """Whether the knapsack chooses the masks of all groups together. One share alone is met by a threshold."""
        return self.is_speed or self.takes_attempts or len(self.limits) > 1

    @property
    def share(self) -> Mapping[Quantity, float] | None:
        """The one share that a threshold has to meet; None if there is none, or the knapsack chooses."""
        return None if self.takes_knapsack else self.limits or None

    @property
    def besides_accuracy(self) -> dict[str, float]:
        """All that it asks for but the accuracy, by the recipe's keys."""
        speeds = {"speedup": self.speedup, "latency_ms": self.latency_ms}
        return {key: value for key, value in speeds.items() if value is not None} | {**self.limits}


@dataclass(frozen=True)
class Phases:
    """How each phase trains: the recipe's section `training` with the overrides of the phase."""

    dense: TrainOptions
    sparsify: TrainOptions
    finetune: TrainOptions


@dataclass(frozen=True)
class Arguments:
    """The arguments that follow from a recipe.

    `grouping` are those of `find_groups`. `finished` are those of a finished model, whose channels are chosen by what
    the repair leaves (`cut.repair` without a sparsify phase); else None.
    `augment` is None for no augmentation. `trains_baseline`: the dense model is trained on for as long as the pruned
    one. By default it is, unless it is a finished model (`dense.epochs` is 0).
    """

    phases: Phases
    augment: Augment | None
    grouping: Mapping[str, Any]
    finished: Options | None
    target: Target
    trains_baseline: bool

    @staticmethod
    def of(recipe: Recipe) -> Arguments:
        """Work out the arguments of a recipe."""
        cut, dense = recipe.cut, recipe.dense
        finished = _finished(recipe)
        return Arguments(
            phases=Phases(
                *(_train_options(recipe, phase) for phase in (dense, recipe.sparsify, recipe.finetune))
            ),
            augment=_augmentation(recipe.data),
            grouping={
                "ignore": cut.ignore,
                "through_layer_norm": cut.through_layer_norm,
                "blocks": "all" if cut.blocks and finished is not None else cut.blocks,
                "round_to": cut.round_to,
                "min_channels": cut.min_channels,
            },
            finished=finished,
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
    """Make the sparsify phase's Sparsifier. Raises InputError if the target is out of reach or no group is free."""
    spec, target = recipe.sparsify, Target.of(recipe.cut.target)
    shares = PhaseShares(spec.warmup, spec.ramp, spec.debias)
    strength: AutoStrength | ConstantStrength
    learned: LearnedImportance
    if spec.strength == "auto":
        # After the warm-up the masks that the knapsack chooses replace this target.
        aim: Mapping[Quantity, float] = {"macs": 1.0} if target.takes_knapsack else target.share or {}
        learned = "magnitude" if spec.importance == "curves" else spec.importance  # masks by curves need none
        strength = AutoStrength(aim, total_steps, shares, learned, costs)
    else:
        strength = ConstantStrength(
            spec.strength, total_steps, shares, adaptive=spec.adaptive, costs=costs, revive=spec.revive
        )
    return Sparsifier(model, groups, spec.penalty, strength=strength)


def build_model(recipe: Recipe, num_classes: int, *, weights: bool) -> nn.Module:
    """Build the recipe's model, with the weights it names or random ones drawn from its seed."""
    seed_everything(recipe.seed, "model", 0)
    checkpoint = recipe.model.checkpoint if weights else None
    if recipe.model.factory is not None:
        model = build_own_model(recipe, num_classes)
        if checkpoint is not None:
            load_weights_(model, checkpoint, num_classes=num_classes)
        return model
    check_timm_arguments(recipe)
    return create_model(
        recipe.model.label,
        num_classes=num_classes,
        in_chans=recipe.data.in_chans,
        pretrained=recipe.model.pretrained and weights,
        checkpoint=checkpoint,
        image_size=recipe.data.image_size,
        args=recipe.model.args,
    )


def check_timm_arguments(recipe: Recipe) -> None:
    """Raise ModelError if `model.args` holds what does not shape timm's model."""
    check_name(recipe.model.label)
    with naming("model.args"):
        check_arguments(recipe.model.label, recipe.model.args)


def build_own_model(recipe: Recipe, num_classes: int | None) -> nn.Module:
    """Build what `model.factory` returns. Where `num_classes` is None the function decides about it.

    Raises ModelError, whose message begins with the key to mend.
    """
    keywords = _own_arguments(recipe, num_classes)
    with naming(f"model.factory {recipe.model.factory}"):
        return create_own_model(recipe.model.label, keywords)


def model_arguments(recipe: Recipe, num_classes: int) -> dict[str, Any]:
    """The keywords that the model is built with, by timm or by the function that the recipe names."""
    if recipe.model.factory is not None:
        return _own_arguments(recipe, num_classes)
    return build_arguments(
        recipe.model.label,
        num_classes=num_classes,
        in_chans=recipe.data.in_chans,
        image_size=recipe.data.image_size,
        args=recipe.model.args,
    )


def starts_trained(recipe: Recipe, num_classes: int) -> bool:
    """Whether the recipe starts from weights that were trained, as far as that can be seen.

    A function of one's own loads weights if those that it returns do not depend on the random state.
    """
    if recipe.model.pretrained or recipe.model.checkpoint is not None:
        return True
    if recipe.model.factory is None:
        return False
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    first, second = (build_model(one, num_classes, weights=True).state_dict() for one in (recipe, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Put a key of the recipe before the message of a ModelError: what is below knows no recipe."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{subject}: {error}") from error


def image_config(recipe: Recipe, model: nn.Module) -> InputConfig:
    """Return how images become inputs of the model: as the recipe says, else as timm does for this model."""
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
    """Make the Accelerator for the recipe's device and precision.

    Its processes wait for each other for as long as one may work alone.
    """
    if recipe.device.startswith("cuda:"):
        torch.cuda.set_device(recipe.device)
    # The first process measures, repairs, exports and tests while the others wait, some minutes or hours. By default
    # torch gives up after ten minutes. If a process dies, its launcher ends the others without a timeout.
    alone = timedelta(days=1, seconds=recipe.cut.repair.distill_seconds if recipe.cut.repair else 0)
    return Accelerator(
        cpu=recipe.device == "cpu",
        mixed_precision=recipe.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=alone)],
    )


def _own_arguments(recipe: Recipe, num_classes: int | None) -> dict[str, Any]:
    factory, data = recipe.model.label, recipe.data
    with naming(f"model.factory {factory}"):
        import_function(factory)
    with naming("model.args"):
        return call_arguments(
            factory,
            recipe.model.args,
            {"num_classes": num_classes, "in_chans": data.in_chans, "img_size": data.image_size},
        )


def _finished(recipe: Recipe) -> Options | None:
    cut = recipe.cut
    if cut.repair is None or recipe.sparsify.epochs:
        return None
    return Options(
        importance="lasso" if cut.importance == "lasso" else "greedy",
        ignore=cut.ignore,
        threads=recipe.benchmark.threads,
        batch_size=recipe.export.batch_size,
        blocks=cut.blocks,
        through_layer_norm=cut.through_layer_norm,
        round_to=cut.round_to,
        min_channels=cut.min_channels,
        max_images=cut.repair.images,
        seed=recipe.seed,
    )


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
