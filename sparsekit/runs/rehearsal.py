"""The data and the model that a recipe names, opened and tried once before hours are spent on them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import InputError, ModelError
from sparsekit.export.session import check_provider
from sparsekit.finished.images import FEWEST_IMAGES
from sparsekit.machine import check_threads
from sparsekit.recipe.recipe import Recipe
from sparsekit.runs.arguments import (
    Arguments,
    Target,
    build_model,
    build_own_model,
    check_timm_arguments,
    image_config,
    make_sparsifier,
    model_arguments,
    starts_trained,
)
from sparsekit.selection.importance import all_alike
from sparsekit.selection.knapsack import Knapsack
from sparsekit.structure.groups import ChannelGroups
from sparsekit.training.loader import make_loader
from sparsekit.training.models import InputConfig, load_weights_, trained_classes
from sparsekit.training.optimizers import make_optimizer
from sparsekit.training.options import Loader
from sparsekit.training.own_models import first_line_and_place, hashes_of_code
from sparsekit.training.splits import ImageData, fingerprint, open_data


@dataclass(frozen=True)
class Inputs:
    """A recipe's images, how they become inputs, and the arguments that the model is built with.

    `code` has the SHA-256 of each file that makes a network of one's own, by the name of its module.
    """

    data: ImageData
    config: InputConfig
    model_args: dict[str, Any]
    fingerprint: str
    code: Mapping[str, str] = field(default_factory=dict)


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
    probe = attempt(lambda: _probe(recipe, None if data is None else len(data.class_names)))
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
    own = recipe.model.factory
    return Inputs(
        data,
        config,
        model_arguments(recipe, len(data.class_names)),
        fingerprint(data),
        {} if own is None else hashes_of_code(own, probe),
    )


def _probe(recipe: Recipe, n_classes: int | None) -> nn.Module | None:
    """Build the model. Without data any number of classes shows whether timm can; one's own is not called with it."""
    if n_classes is None and recipe.model.factory is not None:
        model_arguments(recipe, 1000)  # whether there is such a function, with such parameters
        return None
    return build_model(recipe, n_classes or 1000, weights=False)


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
                f"dense.epochs is 0, but the pretrained {recipe.model.label} knows {trained} classes and the data has "
                f"{len(data.class_names)}: its new classifier has to be trained; set dense.epochs"
            )
    n_classes = len(data.class_names)
    if recipe.dense.epochs == 0 and not starts_trained(recipe, n_classes):
        raise ModelError(
            f"dense.epochs 0 needs trained weights, and {recipe.model.factory} draws new ones at every call: load them "
            "in the function, set model.checkpoint, or train for some epochs"
        )
    arguments = Arguments.of(recipe)
    for options in (arguments.phases.dense, arguments.phases.sparsify, arguments.phases.finetune):
        make_optimizer(model, options)
    _check_enough(recipe, len(data.train))
    count = min(2, recipe.data.batch_size)
    few = data.train.subset(np.arange(min(count, len(data.train))))
    loader = make_loader(few, config, training=True, batch_size=count, augment=arguments.augment)
    images, _ = next(iter(loader))
    _check_forward(recipe, model, images, n_classes)
    groups = find_groups(model, images[:1], **arguments.grouping)
    if arguments.target.takes_knapsack:
        _check_limits(arguments.target, groups)
    if recipe.sparsify.epochs:
        make_sparsifier(recipe, model, groups, total_steps=1, costs=None)
    elif not groups.free:
        raise ModelError(
            f"no channel group of {recipe.model.label} is free to be cut; see `sparsekit inspect`"
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
    _run(recipe, model, images, training=True)
    outputs = _run(recipe, model, images, training=False)
    if isinstance(outputs, Tensor) and outputs.shape == (len(images), n_classes):
        return
    if recipe.model.factory is None:
        raise ModelError(f"{recipe.model.name} does not give one number for each class; check model.args")
    raise ModelError(
        f"model.factory {recipe.model.factory}: the model must give one number for each of {n_classes} classes, got "
        f"{_shape_of(outputs)} for {len(images)} images; a parameter num_classes of the function gets their number"
    )


def _run(recipe: Recipe, model: nn.Module, images: Tensor, *, training: bool) -> object:
    """The model's outputs. Raises ModelError if it does not run on these images."""
    try:
        with torch.no_grad():
            return model.train(training)(images)
    except Exception as error:
        mode = "training" if training else "evaluation"
        size = "x".join(map(str, images.shape[1:]))
        who = f"model.factory {recipe.model.factory}: it" if recipe.model.factory else recipe.model.label
        raise ModelError(
            f"{who} does not run in {mode} on {len(images)} images of {size} ({first_line_and_place(error)}); another "
            "data.image_size or data.batch_size may help"
        ) from error


def _shape_of(outputs: object) -> str:
    return str(list(outputs.shape)) if isinstance(outputs, Tensor) else type(outputs).__name__


def _check_patterns(recipe: Recipe, model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in recipe.cut.ignore:
        if not fnmatch.filter(names, pattern):
            raise ModelError(f"cut.ignore: the pattern {pattern!r} matches no module of {recipe.model.label}")


def _open_images(recipe: Recipe) -> ImageData:
    spec = recipe.data
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
    return replace(data, class_names=tuple(map(str, range(_known_classes(recipe)))))


def _known_classes(recipe: Recipe) -> int:
    """The number of classes that a finished model knows. Raises ModelError if it is no classifier."""
    spec, size = recipe.model, recipe.data.image_size or 0
    if spec.factory is None:
        check_timm_arguments(recipe)
        return trained_classes(
            spec.label, checkpoint=spec.checkpoint, image_size=recipe.data.image_size, args=spec.args
        )
    model = build_own_model(recipe, None)
    outputs = _run(recipe, model, torch.zeros(1, recipe.data.in_chans, size, size), training=False)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        raise ModelError(
            f"model.factory {spec.factory}: the model must give one number for each class, got {_shape_of(outputs)} "
            "for 1 image"
        )
    return outputs.shape[1]
