"""One run of a recipe: its inputs, files and processes, and what several stages do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import Tensor, nn

from sparsekit.artifact.dense_model import Factory
from sparsekit.artifact.load import load as load_artifact
from sparsekit.artifact.save import save as save_artifact
from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import RunError, SparsekitError
from sparsekit.evaluation import copied
from sparsekit.machine import library_versions
from sparsekit.recipe.reading import dump_recipe
from sparsekit.recipe.recipe import Recipe
from sparsekit.repair.recalibration import recalibrate_batchnorms
from sparsekit.runs.arguments import Arguments, build_model
from sparsekit.runs.rehearsal import Inputs
from sparsekit.runs.run_directory import RunDirectory
from sparsekit.structure.groups import ChannelGroups
from sparsekit.structure.plan import PrunePlan
from sparsekit.training.data_sources import Images
from sparsekit.training.display import EpochMetrics
from sparsekit.training.evaluate import answers, evaluate
from sparsekit.training.loader import make_loader
from sparsekit.training.loop import fit
from sparsekit.training.models import load_weights_, save_weights
from sparsekit.training.options import Distillation, Loader, StepHook, TrainOptions
from sparsekit.training.own_models import create_own_model

# Parity is checked on this many validation images.
_PARITY_IMAGES = 64

Split = Literal["train", "validation", "test"]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Run:
    """Everything that a stage works with.

    `origin` is the run directory that has the dense model, where that is another. `arguments` follow from the recipe.
    """

    recipe: Recipe
    inputs: Inputs
    files: RunDirectory
    accelerator: Accelerator
    console: Console
    origin: RunDirectory | None = None
    # Shared with the runs of attempts, which `replace` makes.
    _answered: dict[str, Images] = field(repr=False, default_factory=dict)
    arguments: Arguments = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", Arguments.of(self.recipe))

    def say(self, message: str) -> None:
        """Print a line and add it to run.log, once for all processes."""
        self.files.log(message)
        if self.accelerator.is_main_process:
            self.console.print(message, highlight=False, markup=False)

    @property
    def example(self) -> Tensor:
        """An input of the model: zeros (1, channels, height, width), on the device."""
        return torch.zeros(1, *self.inputs.config.input_size, device=self.accelerator.device)

    @property
    def timed_example(self) -> Tensor:
        """An input that latencies are measured with: zeros (batch, channels, height, width), on the CPU."""
        return torch.zeros(self.recipe.export.batch_size, *self.inputs.config.input_size)

    def by_the_first(self, action: Callable[[], _Result]) -> _Result:
        """Do it in the first process and return the result, or raise the error, in all: measured times differ."""
        shared: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                shared[0] = action()
            except SparsekitError as error:
                shared[1] = error
            except Exception as error:
                shared[1] = RunError(f"{type(error).__name__}: {error}")
                shared[1].__cause__ = error if self.accelerator.num_processes == 1 else None
        broadcast_object_list(shared)
        if shared[1] is not None:
            raise shared[1]
        found: _Result = shared[0]
        return found

    def find_groups(self, model: nn.Module) -> ChannelGroups:
        """Find the channel groups of a model, with the options of the recipe."""
        return find_groups(model, self.example, **self.arguments.grouping)

    @property
    def measure(self) -> str:
        """What models are judged by: accuracy, or agreement with the dense model where there are no labels."""
        return "accuracy" if self.recipe.data.labels else "agreement"

    def images(self, split: Split) -> Images:
        """Return the images of a split; if they have no labels, with the answers of the dense model in their place."""
        images: Images = getattr(self.inputs.data, split)
        if self.recipe.data.labels:
            return images
        if split not in self._answered:
            found = answers(self.weights("dense"), self.loader(images, False))
            self._answered[split] = images.labelled(found.numpy())
        return self._answered[split]

    def loader(self, images: Images, training: bool) -> Loader:
        """Make a loader of images, augmented for training."""
        spec = self.recipe.data
        return make_loader(
            images,
            self.inputs.config,
            training=training,
            batch_size=spec.batch_size if training else spec.eval_batch_size or spec.batch_size,
            workers=spec.workers,
            augment=self.arguments.augment if training else None,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def train(
        self,
        model: nn.Module,
        options: TrainOptions,
        name: str,
        tick: Callable[[], None],
        *,
        hook: StepHook | None = None,
        teacher: Distillation | None = None,
        first_epoch: int = 0,
    ) -> None:
        """Train one phase, resumed from its state file if there is one."""
        if not options.epochs:
            return
        shown = name.partition("-")[0]

        def note(metrics: EpochMetrics) -> None:
            row = replace(metrics, phase=shown, epoch=metrics.epoch + first_epoch)
            self.files.add_metrics(asdict(row))
            tick()

        history = fit(
            model,
            (self.loader(self.images("train"), True), self.loader(self.images("validation"), False)),
            options,
            phase=name,
            seed=self.recipe.seed,
            accelerator=self.accelerator,
            hook=hook,
            teacher=teacher,
            state_path=self.files.checkpoints / f"{name}.state.safetensors",
            on_epoch=note,
            console=self.console,
        )
        for metrics in history:  # an epoch may have been trained but not noted when the process was killed
            note(metrics)

    def evaluate(self, model: nn.Module, images: Images) -> float:
        """Return the accuracy on these images, in [0, 1]."""
        return evaluate(model, self.loader(images, False), self.accelerator).accuracy

    def recalibrate(self, model: nn.Module) -> None:
        """BatchNorm statistics from random training images, if the recipe asks for it."""
        images, spec = self.inputs.data.train, self.recipe.data
        size = spec.eval_batch_size or spec.batch_size
        n = min(self.recipe.cut.recalibrate, len(images))
        if n:
            chosen = np.random.default_rng(self.recipe.seed).permutation(len(images))[
                : max(n - n % size, min(n, size))
            ]
            loader = self.loader(images.subset(chosen), training=False)
            recalibrate_batchnorms(model, (batch.to(self.accelerator.device) for batch, _ in loader))

    def keep_weights(self, model: nn.Module, name: str) -> None:
        """Write the weights for later stages (`weights`). All processes wait for it."""
        if self.files.writes:
            save_weights(model, self.files.checkpoints / f"{name}.safetensors")
        self.accelerator.wait_for_everyone()

    def weights(self, name: str) -> nn.Module:
        """Build the uncut model, on the device, with the weights that an earlier stage kept."""
        num_classes = len(self.inputs.data.class_names)
        model = build_model(self.recipe, num_classes, weights=False)
        files = self.origin if self.origin is not None and name in ("dense", "baseline") else self.files
        load_weights_(model, files.checkpoints / f"{name}.safetensors", num_classes=num_classes)
        return model.to(self.accelerator.device)

    def final_dense(self) -> nn.Module:
        """Build the model that the pruned one is compared with: the baseline, else the dense model."""
        return self.weights("baseline" if self.arguments.trains_baseline else "dense")

    def validation_images(self) -> Tensor:
        """Return the first validation images, (n, channels, height, width), on the device."""
        batches: Iterator[Any] = iter(self.loader(self.inputs.data.validation, False))
        images: Tensor = torch.cat([next(batches)[0]])
        for batch in batches:
            if len(images) >= _PARITY_IMAGES:
                break
            images = torch.cat([images, batch[0]])
        return images[:_PARITY_IMAGES].to(self.accelerator.device)

    @property
    def factory(self) -> Factory | None:
        """What builds the dense model of this run's artifacts; None for timm's, which build themselves."""
        own = self.recipe.model.factory
        return None if own is None else partial(create_own_model, own, self.inputs.model_args)

    def load_artifact(self, path: Path) -> nn.Module:
        """Load a cut model of this run, on the CPU, in eval mode."""
        return load_artifact(path, factory=self.factory)

    def save_artifact(self, model: nn.Module, path: Path, plan: PrunePlan, info: Mapping[str, Any]) -> None:
        """Write a cut model as an artifact. All processes wait for it."""
        if self.files.writes:
            timm = {"model_name": self.recipe.model.name, "model_args": self.inputs.model_args}
            source = timm if self.factory is None else {"factory": self.factory}
            save_artifact(model, path, plan=plan, info=info, **source)
        self.accelerator.wait_for_everyone()

    def describe(self, **accuracies: float) -> dict[str, Any]:
        """Return the metadata of artifact and ONNX file: how to feed the model, and where it comes from.

        Without labels an accuracy is agreement with the dense model, and is called so. `model_args` are those that the
        function of a network of one's own was called with.
        """
        own = {} if self.factory is None else {"model_args": self.inputs.model_args}
        return {
            "model": self.recipe.model.label,
            **own,
            "class_names": list(self.inputs.data.class_names),
            **asdict(self.inputs.config),
            **{name.replace("accuracy", self.measure): value for name, value in accuracies.items()},
            "recipe": dump_recipe(self.recipe, names_only=True),
            "versions": library_versions(),
        }


def bare_copy(model: nn.Module) -> nn.Module:
    """Copy a model without the forward that accelerate may have set on it."""
    duplicate = copied(model)
    for name in ("forward", "_original_forward"):
        duplicate.__dict__.pop(name, None)
    return duplicate
