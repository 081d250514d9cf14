"""What a recipe names, opened and checked: images, model, device; and its sections as plain arguments."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparsekit.analysis import find_groups
from sparsekit.choice import Choice
from sparsekit.data import Augment, ImageData, fingerprint, make_loader, open_data
from sparsekit.errors import InputError, ModelError
from sparsekit.groups import ChannelGroups
from sparsekit.machine import channel_multiple, check_threads
from sparsekit.masks import Quantity
from sparsekit.models import InputConfig, build_arguments, create_model, input_config, load_weights_
from sparsekit.recipe import DenseSpec, FinetuneSpec, Recipe, SparsifySpec
from sparsekit.schedules import PhaseShares
from sparsekit.session import check_provider
from sparsekit.sparsifier import Sparsifier
from sparsekit.speed_search import block_rounding
from sparsekit.train import TrainOptions, make_optimizer, seed_everything


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, opened: images, how they become tensors, and the arguments timm builds the model with."""

    data: ImageData
    config: InputConfig
    model_args: dict[str, Any]
    fingerprint: str


def check_inputs(recipe: Recipe) -> list[str]:
    """Problems of a valid recipe with the world: model name, data, checkpoint, device, threads. Trains nothing."""
    try:
        open_inputs(recipe)
    except InputError as error:
        return str(error).splitlines()
    return []


def open_inputs(recipe: Recipe) -> Inputs:
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
    attempt(lambda: check_provider(recipe.benchmark.provider))
    data = attempt(lambda: _open_images(recipe))
    # Without data any class count shows whether the model can be built.
    probe = attempt(lambda: build_model(recipe, len(data.class_names) if data else 1000, weights=False))
    config = attempt(lambda: _input_config(recipe, probe)) if probe is not None else None
    if probe is not None:
        attempt(lambda: _check_patterns(recipe, probe))
    if data and probe is not None and recipe.model.checkpoint is not None:
        attempt(
            lambda: load_weights_(
                probe, Path(str(recipe.model.checkpoint)), num_classes=len(data.class_names)
            )
        )
    if data is not None and config is not None and not problems:
        attempt(lambda: _rehearse(recipe, data, config, probe))
    if problems or data is None or config is None:
        raise InputError("\n".join(dict.fromkeys(problems)))
    model_args = build_arguments(
        recipe.model.name,
        num_classes=len(data.class_names),
        in_chans=recipe.data.in_chans,
        image_size=recipe.data.image_size,
        args=recipe.model.args,
    )
    return Inputs(data, config, model_args, fingerprint(data))


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


def _rehearse(recipe: Recipe, data: ImageData, config: InputConfig, model: nn.Module) -> None:
    """Do once, on two images, what would otherwise fail in a later stage, after hours of training."""
    if recipe.dense.epochs == 0 and recipe.model.pretrained:
        trained = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
        if trained is not None and trained != len(data.class_names):
            raise ModelError(
                f"dense.epochs is 0, but the pretrained {recipe.model.name} knows {trained} classes and the data has "
                f"{len(data.class_names)}: its new classifier has to be trained; set dense.epochs"
            )
    for phase in (recipe.dense, recipe.sparsify, recipe.finetune):
        make_optimizer(model, train_options(recipe, phase))
    count = min(2, recipe.data.batch_size)
    few = data.train.subset(np.arange(min(count, len(data.train))))
    loader = make_loader(few, config, training=True, batch_size=count, augment=augmentation(recipe))
    images, _ = next(iter(loader))
    _check_forward(recipe, model, images, len(data.class_names))
    groups = find_groups(model, images[:1], **group_options(recipe))
    if wants_choice(recipe):
        _check_limits(recipe, groups)
    if recipe.sparsify.epochs:
        make_sparsifier(recipe, model, groups, total_steps=1, costs=None)
    elif not groups.free:
        raise ModelError(
            f"no channel group of {recipe.model.name} is free to be cut; see `sparsekit inspect`"
        )


def _check_limits(recipe: Recipe, groups: ChannelGroups) -> None:
    worth = {group.name: torch.ones(group.n_channels) for group in groups.free}
    choice = Choice(groups, worth, group_rounding(recipe, groups))
    for quantity, share in kept_limits(recipe).items():
        least = choice.least(quantity)
        if share < least:
            raise InputError(
                f"cut.target.{quantity} {share:g} is out of reach: keeping the fewest channels allowed leaves "
                f"{least:.3f}; raise it, or lower cut.min_channels or cut.round_to"
            )


def _check_forward(recipe: Recipe, model: nn.Module, images: Tensor, n_classes: int) -> None:
    size = "x".join(map(str, images.shape[1:]))
    outputs = None
    for training in (True, False):
        try:
            with torch.no_grad():
                outputs = model.train(training)(images)
        except Exception as error:
            mode = "training" if training else "evaluation"
            raise ModelError(
                f"{recipe.model.name} does not run in {mode} on {len(images)} images of {size} "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); another data.image_size or data.batch_size "
                "may mend it"
            ) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (len(images), n_classes):
        raise ModelError(f"{recipe.model.name} does not give one number a class; check model.args")


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


def _check_patterns(recipe: Recipe, model: nn.Module) -> None:
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
