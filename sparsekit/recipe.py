"""The recipe: what one run does, as typed, closed and frozen specs, and how a YAML file becomes one.

`load_recipe` reports every mistake at once, each on a line of its own that says what was expected, what was
found and where. YAML is read by the core rules of YAML 1.2: `1e-4` is a number, `no`, `on` and `off` are
texts, only `true` and `false` are booleans, and a key that stands twice is a mistake.

Relative paths in a recipe, like those on the command line, start at the directory the command is run from.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from sparsekit.errors import RecipeError

__all__ = [
    "AugmentSpec",
    "BenchmarkSpec",
    "CutSpec",
    "DataSpec",
    "DenseSpec",
    "DistillSpec",
    "ExportSpec",
    "FinetuneSpec",
    "ModelSpec",
    "Recipe",
    "SparsifySpec",
    "TargetSpec",
    "TrainingSpec",
    "default_output",
    "dump_recipe",
    "load_recipe",
]


# -------------------------------------------------------------------------------------------------- the specs


def _refuse_empty(value: object) -> object:
    # Path("") is the current directory, which nobody means by an empty text.
    if value == "":
        raise ValueError("empty path")
    return value


Scalar = bool | int | float | str | None
UserPath = Annotated[Path, AfterValidator(Path.expanduser), BeforeValidator(_refuse_empty)]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Kept = Annotated[float, Field(gt=0, le=1)]
Pair = tuple[Positive, Positive]
Arguments = dict[str, Scalar | tuple[Scalar, ...]]
Schedule = Literal["cosine", "linear", "constant"]

_ARGUMENTS: dict[str, JsonValue] = {
    "expected": "a mapping of names to numbers, texts, true/false, null or lists of these"
}
_DATASET: dict[str, JsonValue] = {
    "expected": "digits, folder, or a timm dataset name such as torch/cifar10 or hfds/owner/name"
}


class _Spec(BaseModel):
    """Closed (unknown keys are refused), frozen, and strict (the text '3' is not the number 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSpec(_Spec):
    """The architecture and where its weights come from."""

    name: Name = Field(description="timm model name, such as resnet18")
    pretrained: bool = Field(default=False, description="start from timm's pretrained weights (a download)")
    checkpoint: UserPath | None = Field(default=None, description="start from this safetensors file")
    args: Arguments = Field(
        default_factory=dict,
        description="further arguments of timm.create_model, such as drop_path_rate",
        json_schema_extra=_ARGUMENTS,
    )


class AugmentSpec(_Spec):
    """Random changes to training images."""

    scale: Pair = Field(
        default=(0.08, 1.0), description="random crop: smallest and largest share of the image's area"
    )
    ratio: Pair = Field(
        default=(0.75, 1.3333), description="random crop: smallest and largest width over height"
    )
    hflip: Share = Field(default=0.5, description="probability of a left-right flip")
    vflip: Share = Field(default=0.0, description="probability of an upside-down flip")
    color_jitter: float | None = Field(
        default=0.4, ge=0, description="strength of brightness, contrast and colour jitter"
    )
    auto_augment: Name | None = Field(default=None, description="timm policy, such as rand-m9-mstd0.5-inc1")
    random_erase: Share = Field(default=0.0, description="probability of erasing a random rectangle")


class DataSpec(_Spec):
    """The images, how they are split, and how they become tensors."""

    name: str = Field(
        default="folder",
        pattern=r"^(digits|folder|[A-Za-z]+/.+)$",
        description="digits (embedded), folder (a folder or tar of class folders), or a timm dataset name "
        "such as torch/cifar10 or hfds/owner/name",
        json_schema_extra=_DATASET,
    )
    root: UserPath | None = Field(
        default=None, description="folder that holds the splits, or the downloaded dataset"
    )
    train: str = Field(
        default="train",
        description="training split: a folder or tar under root ('' is root), or a split name",
    )
    validation: Name | None = Field(default=None, description="validation split; null takes a share of train")
    test: Name | None = Field(default=None, description="test split; null takes a share of train")
    validation_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of train where validation is null"
    )
    test_share: float = Field(default=0.1, gt=0, lt=1, description="share of train where test is null")
    train_limit: int | None = Field(
        default=None, ge=1, description="use only this many training images, drawn by seed"
    )
    validation_limit: int | None = Field(default=None, ge=1, description="the same for validation images")
    test_limit: int | None = Field(default=None, ge=1, description="the same for test images")
    image_size: int | None = Field(
        default=None, ge=1, description="height and width in pixels; null is the model's own"
    )
    in_chans: Literal[1, 3] = Field(default=3, description="colour channels of the model's input")
    mean: tuple[float, ...] | None = Field(
        default=None, min_length=1, description="per channel; null is the model's own"
    )
    std: tuple[Positive, ...] | None = Field(
        default=None, min_length=1, description="per channel; null is the model's own"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = Field(
        default=None, description="how images are resized; null is the model's own"
    )
    crop_pct: float | None = Field(
        default=None, gt=0, le=1, description="share of the image the centre crop keeps"
    )
    batch_size: int = Field(default=64, ge=1, description="training images in a batch, per process")
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="images in an evaluation batch; null is batch_size"
    )
    workers: int = Field(
        default=0, ge=0, description="processes that load images; 0 loads in the main process"
    )
    augment: AugmentSpec | None = Field(
        default=AugmentSpec(), description="random changes to training images; null or false for none"
    )


class TrainingSpec(_Spec):
    """How every phase trains. A phase may override lr, warmup_epochs and schedule."""

    optimizer: Name = Field(default="sgd", description="timm optimizer name, such as sgd or adamw")
    lr: float = Field(default=0.1, gt=0, description="peak learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of optimizers that have one")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="weight decay; not applied to biases and norms"
    )
    optimizer_args: Arguments = Field(
        default_factory=dict, description="further arguments of the optimizer", json_schema_extra=_ARGUMENTS
    )
    schedule: Schedule = Field(default="cosine", description="how the learning rate falls after the warm-up")
    warmup_epochs: float = Field(
        default=0.0, ge=0, description="epochs in which the learning rate rises to lr"
    )
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of the schedule")
    clip_grad: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    accumulate: int = Field(default=1, ge=1, description="batches whose gradients make one optimizer step")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    mixup: float = Field(default=0.0, ge=0, description="mixup alpha; 0 is off")
    cutmix: float = Field(default=0.0, ge=0, description="cutmix alpha; 0 is off")
    ema: float | None = Field(default=None, gt=0, lt=1, description="decay of averaged weights; null is off")
    channels_last: bool = Field(default=False, description="use the channels-last memory format")


class _Phase(_Spec):
    """What every training phase may set for itself; null takes the value of `training`."""

    epochs: int = Field(ge=0, description="epochs of this phase")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate; null is training.lr")
    warmup_epochs: float | None = Field(
        default=None, ge=0, description="warm-up; null is training.warmup_epochs"
    )
    schedule: Schedule | None = Field(default=None, description="schedule; null is training.schedule")


class DenseSpec(_Phase):
    """The model before anything is removed. With epochs 0 it is only evaluated."""

    baseline: bool | None = Field(
        default=None,
        description="train the dense model on, without penalty, for the epochs of sparsify and finetune, so "
        "that the comparison is fair, and the pruned model has it to learn from (finetune.distill); null does so "
        "unless dense.epochs is 0",
    )


class SparsifySpec(_Phase):
    """Training with the penalty. The shares of the phase that warmup, ramp and debias leave are the hold."""

    penalty: Literal["group_lasso", "l1", "scale_l1", "sparse_group_lasso", "group_mcp"] = Field(
        default="group_lasso",
        description="group_lasso: channels as whole vectors; l1: single weights; scale_l1: BatchNorm scales; "
        "sparse_group_lasso: both; group_mcp: channels, without shrinking those far from zero",
    )
    strength: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        default="auto", description="coefficient of the penalty; auto steers it towards cut.target"
    )
    importance: Literal["taylor", "magnitude"] = Field(
        default="taylor",
        description="what decides which channels strength auto takes: taylor, their effect on the loss, learned from "
        "the gradients of the warmup and after; magnitude, the size of their filters at the start",
    )
    weigh_by: Literal["size", "macs", "latency"] = Field(
        default="size",
        description="what a channel's importance is weighed against: macs, or its latency in ONNX Runtime, measured "
        "layer by layer at export.batch_size and benchmark.threads; size: nothing",
    )
    adaptive: float = Field(
        default=2.0,
        ge=0,
        description="at a constant strength, channels are shrunk faster the lower their score at the start, by "
        "(mean / score) to this power; 0 shrinks all alike",
    )
    revive: bool = Field(
        default=False,
        description="at a constant strength, channels at zero come back when the loss pulls at them harder than the "
        "penalty; not behind BatchNorm and ReLU, where zeros have no gradient",
    )
    warmup: Share = Field(default=0.05, description="share of the phase with strength 0 at the start")
    ramp: Share = Field(default=0.1, description="share of the phase in which the strength rises")
    debias: Share = Field(
        default=0.55, description="share of the phase with strength 0 and the zeros held, at the end"
    )


class TargetSpec(_Spec):
    """How fast the pruned model is to be, how much of the dense one is to be left, or how much accuracy it may cost.

    Of several the tightest binds.
    """

    speedup: float | None = Field(
        default=None,
        gt=1,
        description="times as fast as the dense model in ONNX Runtime, measured at export.batch_size and "
        "benchmark.threads on this machine",
    )
    latency_ms: float | None = Field(
        default=None, gt=0, description="milliseconds in ONNX Runtime, measured in the same way"
    )
    macs: Kept | None = Field(default=None, description="fraction of the MACs to keep")
    params: Kept | None = Field(default=None, description="fraction of the parameters to keep")
    channels: Kept | None = Field(default=None, description="fraction of the removable channels to keep")
    max_accuracy_drop: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="how far validation accuracy may fall below the dense model's; the fastest model within that is "
        "searched for, up to the other targets, in cut.attempts attempts that are each sparsified and fine-tuned",
    )


class CutSpec(_Spec):
    """Which channels go."""

    method: Literal["auto", "zeros", "threshold", "gap", "budget"] = Field(
        default="auto",
        description="zeros: exactly zero channels; threshold: scores below it; gap: below the largest gap in "
        "the log-scores; budget: the lowest scores until target is met; auto: zeros, then budget if target "
        "asks for more",
    )
    threshold: float | None = Field(
        default=None, gt=0, description="score below which a channel goes (method threshold)"
    )
    relative: bool = Field(
        default=True, description="threshold is a fraction of the largest score of its group"
    )
    target: TargetSpec | None = Field(
        default=None,
        description="speedup or latency_ms to reach, fractions of macs, params or channels to keep, "
        "max_accuracy_drop to stay within",
    )
    attempts: int = Field(
        default=4, ge=1, description="models to train on the way to a target of max_accuracy_drop"
    )
    round_to: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="kept channels are rounded up to a multiple; auto is the SIMD block of this CPU",
    )
    min_channels: int = Field(default=8, ge=1, description="channels that every layer keeps at least")
    ignore: tuple[Name, ...] = Field(
        default=(), description="name patterns of modules to leave whole, such as layer4.*"
    )
    recalibrate: int = Field(
        default=0,
        ge=0,
        description="training images from which BatchNorm statistics are measured anew after the cut, before "
        "fine-tuning; worth it if channels go that are not zero",
    )
    through_layer_norm: bool = Field(
        default=False,
        description="cut widths that a LayerNorm runs over too; that changes its mean and variance, so it is not "
        "lossless and needs fine-tuning",
    )
    blocks: bool = Field(
        default=False,
        description="whole residual blocks may go too, where learned layer scales are all that makes them differ from "
        "the identity",
    )


class DistillSpec(_Spec):
    """Learning from the dense model's logits: (1 - weight) CE + weight T^2 KL."""

    weight: Share = Field(default=0.5, description="weight of the dense model's answer against the labels")
    temperature: float = Field(default=2.0, gt=0, description="temperature of both distributions")


class FinetuneSpec(_Phase):
    """Training of the cut model, without penalty."""

    distill: DistillSpec | None = Field(
        default=None,
        description="learn from the dense model too (the baseline, if there is one); null or false for not",
    )


class ExportSpec(_Spec):
    """The ONNX files."""

    opset: int | None = Field(
        default=None, ge=17, le=25, description="ONNX opset; null is the exporter's default"
    )
    batch_size: int = Field(default=1, ge=1, description="batch of the exported graph, and of the benchmark")
    dynamic_batch: bool = Field(default=False, description="leave the batch dimension open")
    precisions: tuple[Literal["int8", "fp16"], ...] = Field(
        default=(), description="the pruned model in fewer bits too, timed and tested beside it"
    )
    calibration: int = Field(
        default=256, ge=1, description="training images that the ranges of int8 activations are taken from"
    )


class BenchmarkSpec(_Spec):
    """The latency measurement in ONNX Runtime, at the batch of `export`."""

    threads: int = Field(default=1, ge=1, description="threads of ONNX Runtime")
    rounds: int = Field(default=100, ge=10, description="timed runs of each model, interleaved")
    warmup: int = Field(default=10, ge=1, description="untimed runs of each model before them")
    provider: Literal["cpu", "cuda", "tensorrt", "openvino", "coreml", "directml"] = Field(
        default="cpu", description="execution provider of ONNX Runtime for this measurement"
    )


class Recipe(_Spec):
    """One run, completely described. Build it with `load_recipe`, or from Python with these specs.

    Raises:
        pydantic.ValidationError: built from Python with a wrong value, or values that contradict each other.
    """

    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of weights, splits, order and augmentation"
    )
    output: UserPath | None = Field(
        default=None, description="run directory; null is runs/<name of the recipe file>"
    )
    device: Name = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps, ...")
    precision: Literal["no", "bf16", "fp16"] = Field(default="no", description="mixed precision")
    model: ModelSpec = Field(description="the architecture and its weights")
    data: DataSpec = Field(default=DataSpec(), description="the images")
    training: TrainingSpec = Field(default=TrainingSpec(), description="how every phase trains")
    dense: DenseSpec = Field(description="stage 1: the dense model")
    sparsify: SparsifySpec = Field(description="stage 2: train with the penalty")
    cut: CutSpec = Field(default=CutSpec(), description="stage 3: which channels go")
    finetune: FinetuneSpec = Field(description="stage 4: train the cut model")
    export: ExportSpec = Field(default=ExportSpec(), description="stage 5: the ONNX files")
    benchmark: BenchmarkSpec = Field(default=BenchmarkSpec(), description="stage 6: measure")

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Recipe:
        found = list(_contradictions(self))
        if found:
            text = "; ".join(one.text for one in found)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "found": found})
        return self


# -------------------------------------------------------------------------------- keys that must fit together


@dataclass(frozen=True)
class _Contradiction:
    """Values that are each fine but not together; `keys` are those involved, the one to change first."""

    keys: tuple[str, ...]
    text: str


def _contradictions(recipe: Recipe) -> Iterator[_Contradiction]:
    yield from _data_contradictions(recipe.data)
    yield from _split_contradictions(recipe.data)
    yield from _training_contradictions(recipe)
    yield from _cut_contradictions(recipe)
    yield from _export_contradictions(recipe)


def _data_contradictions(data: DataSpec) -> Iterator[_Contradiction]:
    if data.root is None and data.name != "digits":
        yield _Contradiction(
            ("data.root", "data.name"),
            f"data.root is required where data.name is {data.name}: the folder to read",
        )
    if data.root is not None and data.name == "digits":
        yield _Contradiction(
            ("data.root", "data.name"),
            f"data.root must be left out where data.name is digits (they are embedded), got '{data.root}'; "
            "to read a folder set data.name to folder",
        )
    for key, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != data.in_chans:
            yield _Contradiction(
                (f"data.{key}", "data.in_chans"),
                f"data.{key} must have one number for each of the {data.in_chans} input channels, "
                f"got {len(values)}",
            )
    if data.augment is None:
        return
    for key, (low, high) in (("scale", data.augment.scale), ("ratio", data.augment.ratio)):
        if low > high or (key == "scale" and high > 1):
            limit = "low <= high <= 1" if key == "scale" else "low <= high"
            yield _Contradiction(
                (f"data.augment.{key}",),
                f"data.augment.{key} must be [low, high] with {limit}, got [{low}, {high}]",
            )


def _split_contradictions(data: DataSpec) -> Iterator[_Contradiction]:
    if data.name == "digits":
        for key, split in (("validation", data.validation), ("test", data.test)):
            if split is not None:
                yield _Contradiction(
                    (f"data.{key}", "data.name"),
                    f"data.{key} must be null where data.name is digits, which are one set, got '{split}'; "
                    f"data.{key}_share says how much of it to take",
                )
    splits = (("train", data.train), ("validation", data.validation), ("test", data.test))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        (name, split), (other, other_split) = splits[first], splits[second]
        if split is not None and split == other_split:
            yield _Contradiction(
                (f"data.{other}", f"data.{name}"),
                f"data.{other} must not be the same split as data.{name}, got '{split}' for both; "
                f"null takes a share of train",
            )
    taken = (data.validation_share if data.validation is None else 0) + (
        data.test_share if data.test is None else 0
    )
    if taken >= 1:
        yield _Contradiction(
            ("data.validation_share", "data.test_share", "data.validation", "data.test"),
            "data.validation_share and data.test_share must leave images to train on (sum < 1), "
            f"got {data.validation_share} and {data.test_share}",
        )


def _training_contradictions(recipe: Recipe) -> Iterator[_Contradiction]:
    training, model = recipe.training, recipe.model
    if model.pretrained and model.checkpoint is not None:
        yield _Contradiction(
            ("model.checkpoint", "model.pretrained"),
            "model.pretrained and model.checkpoint exclude each other: the weights come from one place",
        )
    if recipe.dense.epochs == 0 and not model.pretrained and model.checkpoint is None:
        yield _Contradiction(
            ("dense.epochs", "model.pretrained", "model.checkpoint"),
            "dense.epochs 0 needs trained weights: set model.pretrained or model.checkpoint, "
            "or train for some epochs",
        )
    if (training.mixup or training.cutmix) and recipe.data.batch_size % 2:
        yield _Contradiction(
            ("data.batch_size", "training.mixup", "training.cutmix"),
            f"data.batch_size must be even for mixup and cutmix, got {recipe.data.batch_size}",
        )
    for name, phase in (
        ("dense", recipe.dense),
        ("sparsify", recipe.sparsify),
        ("finetune", recipe.finetune),
    ):
        warmup = training.warmup_epochs if phase.warmup_epochs is None else phase.warmup_epochs
        if 0 < phase.epochs < warmup:
            source = " from training.warmup_epochs" if phase.warmup_epochs is None else ""
            yield _Contradiction(
                (f"{name}.warmup_epochs", f"{name}.epochs", "training.warmup_epochs"),
                f"{name}.warmup_epochs must be at most {name}.epochs, {phase.epochs}, or lr is never "
                f"reached, got {warmup:g}{source}",
            )
        lr = training.lr if phase.lr is None else phase.lr
        if phase.epochs and training.min_lr > lr:
            yield _Contradiction(
                ("training.min_lr", f"{name}.lr", "training.lr", f"{name}.epochs"),
                f"training.min_lr must be at most the lr of {name}, {lr:g}, got {training.min_lr:g}",
            )


def _cut_contradictions(recipe: Recipe) -> Iterator[_Contradiction]:
    sparsify, cut = recipe.sparsify, recipe.cut
    shares = sparsify.warmup + sparsify.ramp + sparsify.debias
    if shares > 1 + 1e-9:
        yield _Contradiction(
            ("sparsify.warmup", "sparsify.ramp", "sparsify.debias"),
            "sparsify.warmup, ramp and debias are shares of the phase and must sum to at most 1, "
            f"got {shares:g}",
        )
    if sparsify.strength == "auto" and sparsify.epochs > 0 and cut.target is None:
        yield _Contradiction(
            ("cut.target", "sparsify.strength", "sparsify.epochs"),
            "cut.target is required where sparsify.strength is auto, for example {speedup: 2}; "
            "or give sparsify.strength a number",
        )
    if sparsify.strength == "auto" and sparsify.penalty == "group_mcp":
        yield _Contradiction(
            ("sparsify.penalty", "sparsify.strength"),
            "sparsify.penalty group_mcp spares what is far from zero, so strength auto cannot take it there; auto "
            "shrinks no channel that is to stay, so take group_lasso, or give sparsify.strength a number",
        )
    if sparsify.strength == "auto" and sparsify.revive:
        yield _Contradiction(
            ("sparsify.revive", "sparsify.strength"),
            "sparsify.revive is for a strength in numbers: auto chooses anew, until it has met its target, which "
            "channels go; leave revive out, or give sparsify.strength a number",
        )
    if cut.method == "budget" and cut.target is None:
        yield _Contradiction(
            ("cut.method", "cut.target"), "cut.method budget needs cut.target, for example {macs: 0.5}"
        )
    if sparsify.epochs == 0 and (cut.method == "zeros" or (cut.method == "auto" and cut.target is None)):
        yield _Contradiction(
            ("cut.method", "sparsify.epochs", "cut.target"),
            f"cut.method {cut.method} finds nothing to cut when sparsify.epochs is 0: no channel "
            "becomes zero; use threshold, gap or budget",
        )
    yield from _threshold_contradictions(cut)
    if cut.target is not None:
        yield from _target_contradictions(recipe, cut.target)


def _target_contradictions(recipe: Recipe, target: TargetSpec) -> Iterator[_Contradiction]:
    sparsify, cut = recipe.sparsify, recipe.cut
    given = [key for key, value in target if value is not None]
    fast = bool({"speedup", "latency_ms"} & set(given)) or given == ["max_accuracy_drop"]
    if not given:
        yield _Contradiction(
            ("cut.target", *(f"cut.target.{key}" for key in TargetSpec.model_fields)),
            f"cut.target must have one of {', '.join(TargetSpec.model_fields)}, got none",
        )
    if target.speedup is not None and target.latency_ms is not None:
        yield _Contradiction(
            ("cut.target.speedup", "cut.target.latency_ms", "cut.target"),
            "cut.target must have one of speedup and latency_ms, got both; "
            "to replace one write cut.target={latency_ms: 5}",
        )
    if fast and recipe.benchmark.provider != "cpu":
        yield _Contradiction(
            ("cut.target", "benchmark.provider"),
            "cut.target is a speed on the CPU, where layers can be timed one by one, got benchmark.provider "
            f"{recipe.benchmark.provider}; ask for macs or params, or leave provider out",
        )
    chosen = len(given) > 1 or fast
    if chosen and cut.method not in ("auto", "budget"):
        yield _Contradiction(
            ("cut.method", "cut.target"),
            f"cut.method {cut.method} knows neither speeds nor accuracies nor several shares, got a cut.target of "
            f"{' and '.join(given)}; use auto or budget",
        )
    if chosen and sparsify.weigh_by != "size":
        yield _Contradiction(
            ("sparsify.weigh_by", "cut.target"),
            f"sparsify.weigh_by is read only where cut.target is one share, got {sparsify.weigh_by} for "
            f"{' and '.join(given)}: there what channels cost is part of the choice; leave it out",
        )


def _export_contradictions(recipe: Recipe) -> Iterator[_Contradiction]:
    if "int8" in recipe.export.precisions and recipe.export.calibration < recipe.export.batch_size:
        yield _Contradiction(
            ("export.calibration", "export.batch_size"),
            f"export.calibration must be at least export.batch_size, {recipe.export.batch_size}, got "
            f"{recipe.export.calibration}",
        )


def _threshold_contradictions(cut: CutSpec) -> Iterator[_Contradiction]:
    keys = ("cut.threshold", "cut.method")
    if cut.method == "threshold" and cut.threshold is None:
        yield _Contradiction(
            ("cut.method", "cut.threshold"), "cut.method threshold needs cut.threshold, a number > 0"
        )
    if cut.method != "threshold" and cut.threshold is not None:
        yield _Contradiction(
            keys,
            f"cut.threshold is read only where cut.method is threshold, got method {cut.method}; remove one",
        )
    if cut.threshold is not None and cut.relative and cut.threshold >= 1:
        yield _Contradiction(
            ("cut.threshold", "cut.relative"),
            "cut.threshold must be a number < 1, a fraction of the largest score, where cut.relative is "
            f"true, got {cut.threshold:g}",
        )


# ---------------------------------------------------------------------------------------- reading and writing


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, then apply `overrides`, each 'path.to.key=value' in YAML; the last one wins.

    Raises:
        RecipeError: the file cannot be read, or holds mistakes; the message has one line for each of them.
    """
    draft = _read_file(path)
    for override in overrides:
        _apply_override_(draft, override)
    _normalise_(draft.values, Recipe)
    recipe, mistakes = _validate(draft)
    problems = sorted({*draft.problems, *mistakes}, key=lambda problem: (problem.place.order, problem.text))
    if problems or recipe is None:
        raise RecipeError("\n".join(f"{problem.text} ({problem.place.label})" for problem in problems))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the recipe with every default written out; `load_recipe` reads it back as an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def default_output(path: Path) -> Path:
    """The run directory of the recipe at `path` where none is named: runs/<file name without suffix>."""
    return Path("runs") / path.stem


# PyYAML follows YAML 1.1: 1e-4 is a text, 010 is eight, 1:30 is ninety, and no, on and off are booleans.
# These are the tags of the core schema of YAML 1.2.2, section 10.3.2.
_TAG = "tag:yaml.org,2002:"
_CORE_TAGS: tuple[tuple[str, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own way to replace its rules)


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's rules beside the core ones: a text that either takes for something else is quoted."""


for _name, _pattern, _first in _CORE_TAGS:
    # The empty text stands for null and has no first character: PyYAML looks it up under "".
    _starts = [*_first, ""] if _name == "null" else [*_first]
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _starts)


@dataclass(frozen=True)
class _Place:
    """Where a value was written; `order` sorts places: the file by line, then the overrides as given."""

    label: str
    order: tuple[int, int]


@dataclass(frozen=True)
class _Problem:
    text: str
    place: _Place


@dataclass
class _Draft:
    """What was written, before it is checked: plain values, and the place of every key by its path."""

    root: _Place
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], _Place] = field(default_factory=dict)
    problems: list[_Problem] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # keys whose value is not plain data, told in `problems`
    overrides: int = 0

    def place(self, path: tuple[str, ...]) -> _Place:
        """The place of the key at `path`, or of the nearest section around it that was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.root)


def _read_file(path: Path) -> _Draft:
    draft = _Draft(_Place(str(path), (0, 0)))
    node = _compose(_read_text(path))
    if isinstance(node, _Syntax):
        raise RecipeError(f"{node.text} ({path}{f', line {node.line}' if node.line else ''})")
    if node is None:
        raise RecipeError(f"{path} is empty; `sparsekit init` writes a recipe to start from")
    if not isinstance(node, yaml.MappingNode):
        sections = ", ".join(Recipe.model_fields)
        raise RecipeError(
            f"a recipe must be a mapping with the keys {sections}, got {_node_word(node)} ({path})"
        )

    def place_of(node: yaml.Node) -> _Place:
        line = node.start_mark.line + 1
        return _Place(f"{path}, line {line}", (0, line))

    draft.values = _Reading(draft, place_of, frozenset()).value(node, ())
    return draft


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = [one.name for one in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = (
            f"did you mean {path.parent / near[0]}?" if near else "`sparsekit init` writes one to start from"
        )
        raise RecipeError(f"recipe {path} does not exist; {hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {path} must be text in UTF-8, got byte {error.start} that is not"
        ) from None
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class _Syntax:
    """Why a text is not YAML, and on which line of it (0 where that is unknown)."""

    text: str
    line: int


def _compose(text: str) -> yaml.Node | _Syntax | None:
    """The node tree of a YAML text; None for an empty one."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if "\\t" in (error.problem or "") else ""
        return _Syntax(
            f"not valid YAML: {error.problem or error.context}{hint}", mark.line + 1 if mark else 0
        )
    except yaml.YAMLError as error:
        return _Syntax(f"not valid YAML: {' '.join(str(error).split())}", 0)
    except RecursionError:
        return _Syntax("not valid as a recipe: nested too deeply", 0)


def _node_word(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"'{str(node.value)[:60]}'"


@dataclass(frozen=True)
class _Reading:
    """Turns nodes into plain values, noting in `draft` where each key stands and what is wrong with it."""

    draft: _Draft
    place_of: Callable[[yaml.Node], _Place]
    around: frozenset[int]

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        if id(node) in self.around:
            return self._refuse(node, path, "must not contain itself, got an alias of a value around it")
        inner = _Reading(self.draft, self.place_of, self.around | {id(node)})
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return inner._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [inner.value(item, path) for item in node.value]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.place_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                text = "a key must be a text, got a list or mapping"
                self.draft.problems.append(_Problem(text, place))
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                text = f"{_dots(here)} stands twice, first in {self.draft.places[here].label}"
                self.draft.problems.append(_Problem(text, place))
            self.draft.places[here] = place
            values[key] = self.value(value_node, here)
        return values

    def _scalar(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        readers: dict[str, Callable[[str], Any]] = {
            "str": str,
            "null": lambda _: None,
            "bool": lambda word: {"true": True, "false": False}[word.lower()],
            "int": lambda word: int(word, 0) if word[:2] in ("0o", "0x") else int(word),
            "float": lambda word: float(re.sub(r"\.(?=inf|nan)", "", word.lower())),
        }
        read = readers.get(node.tag.removeprefix(_TAG)) if isinstance(node, yaml.ScalarNode) else None
        try:
            if read is not None:
                return read(node.value)
        except (KeyError, ValueError):
            pass
        return self._refuse(node, path, f"has the YAML tag {node.tag}, which a recipe cannot hold")

    def _refuse(self, node: yaml.Node, path: tuple[str, ...], text: str) -> None:
        self.draft.refused.add(_dots(path))
        self.draft.problems.append(_Problem(f"{_dots(path)} {text}", self.place_of(node)))


def _apply_override_(draft: _Draft, override: str) -> None:
    """Write the value of 'path.to.key=value' into the draft, as if the file had said so."""
    draft.overrides += 1
    place = _Place(f"--set {override}", (1, draft.overrides))
    dotted, equals, text = override.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(path):
        draft.problems.append(
            _Problem(
                f"an override must be path.to.key=value, such as data.batch_size=32, got '{override}'", place
            )
        )
        return
    node = _compose(text)
    if isinstance(node, _Syntax):
        draft.problems.append(_Problem(node.text, place))
        return
    for known in [known for known in draft.places if known[: len(path)] == path]:
        del draft.places[known]
    section = draft.values
    for depth, key in enumerate(path[:-1], start=1):
        if not isinstance(section.get(key), dict):
            section[key] = {}
            draft.places.setdefault(path[:depth], place)
        section = section[key]
    draft.places[path] = place
    reading = _Reading(draft, lambda node: place, frozenset())
    section[path[-1]] = None if node is None else reading.value(node, path)


def _normalise_(values: dict[str, Any], spec: type[BaseModel]) -> None:
    """A section with all keys commented out is an empty one; false turns off a section that may be null."""
    for key, info in spec.model_fields.items():
        section = _section(info)
        if section is None or key not in values:
            continue
        optional = type(None) in get_args(info.annotation)
        if values[key] is None and not optional:
            values[key] = {}
        elif values[key] is False and optional:
            values[key] = None
        if isinstance(values[key], dict):
            _normalise_(values[key], section)


# ------------------------------------------------------------------------ mistakes, in words a person can use


# Stands in for required keys that are missing or wrong, so that the rest of the recipe can still be checked.
_STAND_IN: Mapping[str, Mapping[str, Any]] = {
    "model": {"name": "resnet18"},
    "dense": {"epochs": 1},
    "sparsify": {"epochs": 1},
    "finetune": {"epochs": 1},
}


def _validate(draft: _Draft) -> tuple[Recipe | None, list[_Problem]]:
    """The recipe, or every mistake in it."""
    try:
        return Recipe.model_validate_json(json.dumps(draft.values)), []
    except ValidationError as error:
        errors = error.errors()
    broken: dict[tuple[str, ...], str] = {}
    for one in errors:
        if one["type"] != "contradiction":
            path = _key_path(one["loc"])
            # A list that is too short is "missing" something too, but further in than the key.
            broken.setdefault(path, one["type"] if len(path) == len(one["loc"]) else "type")
    told = draft.refused
    problems = [
        _problem(draft, path, kind) for path, kind in broken.items() if not _touches([_dots(path)], told)
    ]
    if broken:
        # pydantic compares keys only once each is right by itself: leave the wrong ones out and try again.
        try:
            Recipe.model_validate_json(json.dumps(_without(draft.values, set(broken))))
        except ValidationError as error:
            errors = error.errors()
    dotted = {_dots(path) for path in broken} | told
    for one in errors:
        if one["type"] == "contradiction":
            found: list[_Contradiction] = one["ctx"]["found"]
            problems += [_place(draft, item) for item in found if not _touches(item.keys, dotted)]
    return None, problems


def _dots(path: Sequence[str]) -> str:
    return ".".join(path)


def _touches(keys: Sequence[str], broken: set[str]) -> bool:
    """Whether a broken key is one of `keys`, or around or inside one."""
    return any(
        f"{key}.".startswith(f"{bad}.") or f"{bad}.".startswith(f"{key}.") for key in keys for bad in broken
    )


def _place(draft: _Draft, contradiction: _Contradiction) -> _Problem:
    paths = [tuple(key.split(".")) for key in contradiction.keys]
    written = [draft.places[path] for path in paths if path in draft.places]
    overridden = [place for place in written if place.order[0]]
    place = overridden[-1] if overridden else written[0] if written else draft.place(paths[0])
    return _Problem(contradiction.text, place)


def _without(values: Mapping[str, Any], broken: set[tuple[str, ...]]) -> dict[str, Any]:
    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: copy(inner, (*path, key)) for key, inner in value.items() if (*path, key) not in broken}

    kept = copy(dict(values), ())
    for section, stand_in in _STAND_IN.items():
        kept[section] = {**stand_in, **kept.get(section, {})}
    return dict(kept)


def _key_path(location: Sequence[str | int]) -> tuple[str, ...]:
    """The recipe's key in a pydantic location, which goes on into lists, mappings and members of unions."""
    path: list[str] = []
    spec: type[BaseModel] | None = Recipe
    for part in location:
        if spec is None:
            break
        path.append(str(part))
        info = spec.model_fields.get(str(part))
        spec = None if info is None else _section(info)
    return tuple(path)


def _problem(draft: _Draft, path: tuple[str, ...], kind: str) -> _Problem:
    place, dotted = draft.place(path), _dots(path)
    if kind == "extra_forbidden":
        return _Problem(f"unknown key {dotted}; {_suggestion(path)}", place)
    info = _spec_at(path[:-1]).model_fields[path[-1]]
    if kind == "missing":
        return _Problem(f"{dotted} is required: {info.description}", place)
    got: Any = draft.values
    for key in path:
        got = got[key]
    return _Problem(f"{dotted} must be {_expected_of(info)}, got {_shown(got)}", place)


def _suggestion(path: tuple[str, ...]) -> str:
    """The nearest key of the section, else one of that name in another section, else all of the section."""
    *section, key = path
    siblings = list(_spec_at(tuple(section)).model_fields)
    near = difflib.get_close_matches(key.lower().replace("-", "_"), siblings, n=1)
    if near:
        return f"did you mean {_dots((*section, near[0]))}?"
    elsewhere = [dotted for dotted in _all_keys(Recipe) if dotted.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"the keys of {_dots(section) or 'a recipe'} are {', '.join(siblings)}"


def _all_keys(spec: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, info in spec.model_fields.items():
        yield prefix + key
        section = _section(info)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{key}.")


def _spec_at(path: tuple[str, ...]) -> type[BaseModel]:
    spec: type[BaseModel] = Recipe
    for key in path:
        spec = _section(spec.model_fields[key]) or spec
    return spec


def _section(info: FieldInfo) -> type[BaseModel] | None:
    """The spec that a field holds, or None for a plain value."""
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _expected_of(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "expected" in extra:
        return str(extra["expected"])
    return _expected(info.annotation, info.metadata)


def _expected(kind: Any, metadata: Sequence[Any]) -> str:
    """What a value of this type looks like, bounds included: 'an integer >= 1 or null'."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        extra = [
            one for item in inner[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        return _expected(inner[0], [*extra, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(one, metadata) for one in inner)
    if origin is Literal:
        return inner[0] if len(inner) == 1 else f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        count = "" if inner[1:] == (...,) else f"{len(inner)} values, "
        return f"a list of {count or 'values, '}each {_expected(inner[0], [])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys of {', '.join(kind.model_fields)}"
    if kind is str:
        return "a non-empty text" if any(getattr(one, "min_length", 0) for one in metadata) else "a text"
    words = {int: "an integer", float: "a number", bool: "true or false", Path: "a path", type(None): "null"}
    return words[kind] + (_bounds(metadata) if kind in (int, float) else "")


def _bounds(metadata: Sequence[Any]) -> str:
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    parts = [
        f"{sign} {getattr(one, key):g}"
        if isinstance(getattr(one, key), float)
        else f"{sign} {getattr(one, key)}"
        for one in metadata
        for key, sign in signs
        if getattr(one, key, None) is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _shown(value: Any) -> str:
    """A value as the user would write it, on one line and short."""
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
