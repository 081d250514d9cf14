"""The data and the model that a recipe names, opened and tried once before hours are spent on them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError, ModelError, first_line
from sparsekit.export.session import check_provider
from sparsekit.finished.images import FEWEST_IMAGES
from sparsekit.machine import check_threads
from sparsekit.recipe.recipe import Recipe
from sparsekit.runs.arguments import Arguments, Target, build_model, image_config, make_sparsifier
from sparsekit.selection.importance import all_alike
from sparsekit.selection.knapsack import Knapsack
from sparsekit.structure.groups import ChannelGroups
from sparsekit.training.loader import make_loader
from sparsekit.training.models import InputConfig, build_arguments, load_weights_, trained_classes
from sparsekit.training.optimizers import make_optimizer
from sparsekit.training.options import Loader
from sparsekit.training.splits import ImageData, fingerprint, open_data


@dataclass(frozen=True)
class Inputs:
    """A recipe's images, how they become inputs, and the arguments that timm builds the model with."""

    data: ImageData
    config: InputConfig
    model_args: dict[str, Any]
    fingerprint: str


def some_of_training(recipe: Recipe, inputs: Inputs, count: int) -> Loader:
    """Make a loader of random training images, as in evaluation."""
    spec, images = recipe.data, inputs.data.train
    chosen = np.random.default_rng(recipe.seed).permutation(len(images))[:count]
    return make_loader(
        images.subset(chosen),
        inputs.config,
        training=False,
        batch_size=spec.eval_batch_size or spec.batch_size,
        workers=spec.workers,
    )


def training_images(recipe: Recipe, inputs: Inputs, count: int) -> Tensor:
    """Return random training images, as in evaluation: (n, channels, height, width), on the CPU."""
    return torch.cat([batch for batch, _ in some_of_training(recipe, inputs, count)])


def check_inputs(recipe: Recipe) -> list[str]:
    """List the problems of a valid recipe: model name, data, checkpoint, device, threads. Trains nothing."""
    try:
        open_inputs(recipe)
    except InputError as error:
        return str(error).splitlines()
    return []


def open_inputs(recipe: Recipe) -> Inputs:
    """Open the data and try the model. Raises InputError with one line for each problem."""
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
    # Without data, any number of classes shows whether the model can be built.
    probe = attempt(lambda: build_model(recipe, len(data.class_names) if data else 1000, weights=False))
    config = attempt(lambda: image_config(recipe, probe)) if probe is not None else None
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
    """Do once, on two images, what would otherwise fail after hours of training."""
    if recipe.dense.epochs == 0 and recipe.model.pretrained:
        trained = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
        if trained is not None and trained != len(data.class_names):
            raise ModelError(
                f"dense.epochs is 0, but the pretrained {recipe.model.name} knows {trained} classes and the data has "
                f"{len(data.class_names)}: its new classifier has to be trained; set dense.epochs"
            )
    arguments = Arguments.of(recipe)
    for options in (arguments.phases.dense, arguments.phases.sparsify, arguments.phases.finetune):
        make_optimizer(model, options)
    _check_enough(recipe, len(data.train))
    count = min(2, recipe.data.batch_size)
    few = data.train.subset(np.arange(min(count, len(data.train))))
    loader = make_loader(few, config, training=True, batch_size=count, augment=arguments.augment)
    images, _ = next(iter(loader))
    _check_forward(recipe, model, images, len(data.class_names))
    groups = find_groups(model, images[:1], **arguments.grouping)
    if arguments.target.takes_knapsack:
        _check_limits(arguments.target, groups)
    if recipe.sparsify.epochs:
        make_sparsifier(recipe, model, groups, total_steps=1, costs=None)
    elif not groups.free:
        raise ModelError(
            f"no channel group of {recipe.model.name} is free to be cut; see `sparsekit inspect`"
        )


def _check_enough(recipe: Recipe, n_train: int) -> None:
    asking = ["cut.repair"] if recipe.cut.repair is not None else []
    asking += ["sparsify.importance curves"] if recipe.sparsify.importance == "curves" else []
    for key in asking if n_train < FEWEST_IMAGES else []:
        raise InputError(
            f"{key} needs at least {FEWEST_IMAGES} training images, and there are {n_train}; leave it out"
        )


def _check_limits(target: Target, groups: ChannelGroups) -> None:
    knapsack = Knapsack(groups, all_alike(groups))
    for quantity, share in target.limits.items():
        least = knapsack.least(quantity)
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
                f"({first_line(error)}); another data.image_size or data.batch_size "
                "may help"
            ) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (len(images), n_classes):
        raise ModelError(f"{recipe.model.name} does not give one number for each class; check model.args")


def _check_patterns(recipe: Recipe, model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in recipe.cut.ignore:
        if not fnmatch.filter(names, pattern):
            raise ModelError(f"cut.ignore: the pattern {pattern!r} matches no module of {recipe.model.name}")


def _open_images(recipe: Recipe) -> ImageData:
    spec, model = recipe.data, recipe.model
    data = open_data(
        spec.name,
        root=spec.root,
        train=spec.train,
        validation=spec.validation,
        test=spec.test,
        validation_share=spec.validation_share,
        test_share=spec.test_share,
        limits=(spec.train_limit, spec.validation_limit, spec.test_limit),
        labels=spec.labels,
        seed=recipe.seed,
    )
    if spec.labels:
        return data
    n_classes = trained_classes(
        model.name, checkpoint=model.checkpoint, image_size=spec.image_size, args=model.args
    )
    return replace(data, class_names=tuple(map(str, range(n_classes))))
