"""The specs: one typed section of a recipe each, every key with its default, bounds and description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic.fields import FieldInfo

from sparsekit.options import (
    CutImportance,
    Interpolation,
    MaskMethod,
    Penalty,
    Precision,
    Provider,
    Schedule,
    TrainingImportance,
    WeighBy,
)


def _refuse_empty(value: object) -> object:
    # Path("") is the current directory, which nobody means by an empty text.
    if value == "":
        raise ValueError("empty path")
    return value


def _refuse_nan(value: JsonValue) -> JsonValue:
    json.dumps(
        value, allow_nan=False
    )  # raises ValueError; pydantic's own check does not reach into a JsonValue
    return value


Scalar = bool | int | float | str | None
UserPath = Annotated[Path, AfterValidator(Path.expanduser), BeforeValidator(_refuse_empty)]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Kept = Annotated[float, Field(gt=0, le=1)]
Pair = tuple[Positive, Positive]
Arguments = dict[str, Scalar | tuple[Scalar, ...]]
Values = Annotated[dict[str, JsonValue], AfterValidator(_refuse_nan)]
_ARGUMENTS: dict[str, JsonValue] = {
    "expected": "a mapping of names to numbers, texts, true/false, null or lists of these"
}
_VALUES: dict[str, JsonValue] = {
    "expected": "a mapping of names to numbers, texts, true/false, null, and lists and mappings of these"
}
_FUNCTION: dict[str, JsonValue] = {"expected": "package.module:function, such as nets:build, or null"}
_DATASET: dict[str, JsonValue] = {
    "expected": "digits, folder, or a timm dataset name such as torch/cifar10 or hfds/owner/name"
}


class StrictSpec(BaseModel):
    """What every spec is: closed (unknown keys are refused), frozen, and strict (the text '3' is not the number 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSpec(StrictSpec):
    """The architecture and where its weights come from. It is timm's (`name`) or your own (`factory`)."""

    name: Name | None = Field(default=None, description="timm model name, such as resnet18")
    factory: str | None = Field(
        default=None,
        pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$",
        description="in the place of name, the function that builds a network of your own, such as nets:build for "
        "`def build` in nets.py; it is imported from the current folder, or from what is installed",
        json_schema_extra=_FUNCTION,
    )
    pretrained: bool = Field(
        default=False, description="start from timm's pretrained weights, which are downloaded"
    )
    checkpoint: UserPath | None = Field(
        default=None, description="start from the weights in this safetensors file; null for none"
    )
    args: Values = Field(
        default_factory=dict,
        description="further arguments of timm.create_model, such as drop_path_rate, or the arguments of factory; "
        "factory gets num_classes, in_chans and img_size too where it has parameters of these names",
        json_schema_extra=_VALUES,
    )

    @property
    def label(self) -> str:
        """What the model is called: its timm name, or the function that builds it."""
        return self.factory or self.name or ""


class AugmentSpec(StrictSpec):
    """Random changes to training images."""

    scale: Pair = Field(
        default=(0.08, 1.0),
        description="random crop: smallest and largest share of the image's area that it keeps",
    )
    ratio: Pair = Field(
        default=(0.75, 1.3333),
        description="random crop: smallest and largest ratio of its width to its height",
    )
    hflip: Share = Field(default=0.5, description="probability of a left-right flip")
    vflip: Share = Field(default=0.0, description="probability of an upside-down flip")
    color_jitter: float | None = Field(
        default=0.4,
        ge=0,
        description="strength of random changes in brightness, contrast and colour; null for none",
    )
    auto_augment: Name | None = Field(
        default=None, description="a timm policy, such as rand-m9-mstd0.5-inc1; null for none"
    )
    random_erase: Share = Field(default=0.0, description="probability of erasing a random rectangle")


class DataSpec(StrictSpec):
    """The images, how they are split, and how they become tensors."""

    name: str = Field(
        default="folder",
        pattern=r"^(digits|folder|[A-Za-z]+/.+)$",
        description="where the images are from: digits (1,797 of them come with the installation), folder (a folder or "
        "tar of class folders), or a timm dataset such as torch/cifar10 or hfds/owner/name",
        json_schema_extra=_DATASET,
    )
    root: UserPath | None = Field(
        default=None,
        description="the folder that holds the splits, or the downloaded dataset; null for digits",
    )
    labels: bool = Field(
        default=True,
        description="false: the images have no labels, so they may lie in any folders; the dense model's answers take "
        "their place, and every accuracy is agreement with it; for finished models (dense.epochs 0)",
    )
    train: str = Field(
        default="train",
        description="training images: a folder or tar under root ('' is root itself), or the name of a split",
    )
    validation: Name | None = Field(
        default=None, description="images that steer the run, named like train; null takes a share of train"
    )
    test: Name | None = Field(
        default=None,
        description="images that the report measures on, named like train; null takes a share of train",
    )
    validation_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of train to set aside if validation is null"
    )
    test_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of train to set aside if test is null"
    )
    train_limit: int | None = Field(
        default=None, ge=1, description="use only this many training images, drawn by seed; null uses all"
    )
    validation_limit: int | None = Field(
        default=None, ge=1, description="use only this many validation images; null uses all"
    )
    test_limit: int | None = Field(
        default=None, ge=1, description="use only this many test images; null uses all"
    )
    image_size: int | None = Field(
        default=None, ge=1, description="height and width of an image in pixels; null is the model's own"
    )
    in_chans: Literal[1, 3] = Field(default=3, description="colour channels of the model's input")
    mean: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="mean of the pixels, in [0, 1], one number for each colour channel; null is the model's own",
    )
    std: tuple[Positive, ...] | None = Field(
        default=None,
        min_length=1,
        description="standard deviation of the pixels, one number for each colour channel; null is the model's own",
    )
    interpolation: Interpolation | None = Field(
        default=None, description="how images are resized; null is the model's own"
    )
    crop_pct: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the image's side that the centre crop keeps in evaluation; null is the model's own",
    )
    batch_size: int = Field(default=64, ge=1, description="training images in a batch, for each process")
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="images in a batch of evaluation; null is batch_size"
    )
    workers: int = Field(
        default=0, ge=0, description="processes that load images; 0 loads in the main process"
    )
    augment: AugmentSpec | None = Field(
        default=AugmentSpec(), description="random changes to training images; null or false for none"
    )


class TrainingSpec(StrictSpec):
    """How every phase trains. A phase may override lr, warmup_epochs and schedule."""

    optimizer: Name = Field(default="sgd", description="a timm optimizer, such as sgd or adamw")
    lr: float = Field(default=0.1, gt=0, description="highest learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum, for optimizers that have one")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="weight decay; not applied to biases and norms"
    )
    optimizer_args: Arguments = Field(
        default_factory=dict, description="further arguments of the optimizer", json_schema_extra=_ARGUMENTS
    )
    schedule: Schedule = Field(
        default="cosine",
        description="how the learning rate falls from lr to min_lr after the warm-up; constant: it stays",
    )
    warmup_epochs: float = Field(
        default=0.0, ge=0, description="epochs at the start in which the learning rate rises to lr"
    )
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of the schedule")
    clip_grad: float | None = Field(
        default=None,
        gt=0,
        description="largest norm of the gradient, to which it is scaled down; null for no limit",
    )
    accumulate: int = Field(
        default=1, ge=1, description="batches whose gradients are added up for one optimizer step"
    )
    smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="label smoothing: share of each label that is spread over all classes",
    )
    mixup: float = Field(default=0.0, ge=0, description="mixup alpha; 0 is off")
    cutmix: float = Field(default=0.0, ge=0, description="cutmix alpha; 0 is off")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of the weight average, such as 0.999, with which a phase ends; null is off",
    )
    channels_last: bool = Field(
        default=False, description="use the channels-last memory format, which is faster on GPUs"
    )


class _Phase(StrictSpec):
    """What every training phase may set for itself; null takes the value of `training`."""

    epochs: int = Field(ge=0, description="epochs of this phase")
    lr: float | None = Field(default=None, gt=0, description="highest learning rate; null is training.lr")
    warmup_epochs: float | None = Field(
        default=None,
        ge=0,
        description="epochs in which the learning rate rises; null is training.warmup_epochs",
    )
    schedule: Schedule | None = Field(
        default=None, description="how the learning rate falls; null is training.schedule"
    )


class DenseSpec(_Phase):
    """The model before anything is removed. With epochs 0 it is only evaluated."""

    baseline: bool | None = Field(
        default=None,
        description="train the dense model for the epochs of sparsify and finetune too, without penalty: the "
        "comparison is fair, and the pruned model can learn from it (sparsify.distill, finetune.distill); null does so "
        "unless dense.epochs is 0",
    )


class DistillSpec(StrictSpec):
    """Learning from the dense model: the loss is (1 - weight) CE + weight T^2 KL at temperature T."""

    weight: Share = Field(
        default=0.5, description="weight of the dense model's answers against the labels, in [0, 1]"
    )
    temperature: float = Field(
        default=2.0, gt=0, description="temperature that softens the answers of both models"
    )


class SparsifySpec(_Phase):
    """Training with the penalty: its strength is 0 (warmup), rises (ramp), stays, and is 0 again (debias)."""

    penalty: Penalty = Field(
        default="group_lasso",
        description="what the penalty takes to zero: group_lasso, whole channels; l1, single weights; scale_l1, "
        "BatchNorm scales; sparse_group_lasso, whole channels and single weights; group_mcp, whole channels, but it "
        "does not shrink those that are far from zero",
    )
    strength: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        default="auto",
        description="coefficient of the penalty (lambda); auto steers it until cut.target is met",
    )
    importance: TrainingImportance = Field(
        default="taylor",
        description="what strength auto ranks channels by: taylor, their effect on the loss, learned from gradients "
        "from the warmup on; magnitude, the size of their filters at the start; curves, for a target of a speed or of "
        "several shares: what the outputs lose with fewer channels, measured for each group after the warmup on 512 "
        "training images, without labels",
    )
    weigh_by: WeighBy = Field(
        default="size",
        description="the cost that a channel's importance is weighed against: macs; latency, measured in ONNX Runtime "
        "layer by layer at export.batch_size and benchmark.threads; size, no cost",
    )
    adaptive: float = Field(
        default=2.0,
        ge=0,
        description="with a strength in numbers, channels shrink faster the lower their importance at the start, by "
        "(mean / importance) to this power; 0 shrinks all alike",
    )
    revive: bool = Field(
        default=False,
        description="with a strength in numbers, channels at zero come back if the loss pulls at them harder than the "
        "penalty; channels behind BatchNorm and ReLU cannot, because zeros have no gradient there",
    )
    warmup: Share = Field(default=0.05, description="share of the phase, at its start, with strength 0")
    ramp: Share = Field(
        default=0.1, description="share of the phase, after the warmup, in which the strength rises"
    )
    debias: Share = Field(
        default=0.55, description="share of the phase, at its end, with strength 0 and the zeros held"
    )
    distill: DistillSpec | None = Field(
        default=None,
        description="learn from the dense model too, from the baseline if there is one; null or false: do not",
    )


class TargetSpec(StrictSpec):
    """How fast the pruned model is to be, how much of the dense model may stay, or how much accuracy it may lose.

    If several are given, all hold.
    """

    speedup: float | None = Field(
        default=None,
        gt=1,
        description="speed-up over the dense model in ONNX Runtime on this machine, measured at export.batch_size and "
        "benchmark.threads",
    )
    latency_ms: float | None = Field(
        default=None, gt=0, description="latency in milliseconds, measured like speedup"
    )
    macs: Kept | None = Field(default=None, description="fraction of the MACs to keep, at most")
    params: Kept | None = Field(default=None, description="fraction of the params to keep, at most")
    channels: Kept | None = Field(
        default=None, description="fraction of the removable channels to keep, at most"
    )
    max_accuracy_drop: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="how far the validation accuracy, in [0, 1], may fall below the dense model's; the fastest model "
        "within that is searched for, up to the other targets, by training cut.attempts models",
    )


class RepairSpec(StrictSpec):
    """Making up for a cut without labels, by least squares and by learning from the model before the cut."""

    images: int = Field(
        default=512,
        ge=32,
        description="training images it takes, without their labels; a fifth is kept apart",
    )
    distill_seconds: float = Field(
        default=120.0,
        ge=0,
        description="how long the cut model learns from the one before the cut; 0: not at all",
    )


class CutSpec(StrictSpec):
    """Which channels go."""

    method: MaskMethod = Field(
        default="auto",
        description="which channels go: zeros, those that are exactly zero; threshold, those whose importance is below "
        "it; gap, those below the largest gap in log importance; budget, the least important until target is met; "
        "auto, zeros, and then budget if target asks for more",
    )
    threshold: float | None = Field(
        default=None, gt=0, description="importance below which a channel goes; only for method threshold"
    )
    relative: bool = Field(
        default=True, description="threshold is a fraction of the largest importance in the group"
    )
    target: TargetSpec | None = Field(
        default=None,
        description="what to reach: speedup or latency_ms, fractions of macs, params or channels to keep, or "
        "max_accuracy_drop to stay within; null for none",
    )
    attempts: int = Field(
        default=4,
        ge=1,
        description="how many models may be trained to find the fastest within max_accuracy_drop",
    )
    round_to: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="multiple that the number of kept channels is rounded up to; auto suits this processor",
    )
    min_channels: int = Field(default=8, ge=1, description="how many channels every layer keeps at least")
    ignore: tuple[Name, ...] = Field(
        default=(), description="modules to leave whole, as names or patterns such as layer4.*"
    )
    recalibrate: int = Field(
        default=0,
        ge=0,
        description="number of training images to measure BatchNorm statistics on after the cut; 0 leaves them as they "
        "are; it helps if channels go that are not zero",
    )
    repair: RepairSpec | None = Field(
        default=None,
        description="make up for the cut without labels, where channels go that are not zero; of a finished model "
        "(sparsify.epochs 0) it also chooses the channels, by what the outputs lose, measured; auto: with the "
        "defaults; null or false: do not",
    )
    through_layer_norm: bool = Field(
        default=False,
        description="cut channels that a LayerNorm normalises over too, such as the width of a vision transformer; "
        "the norm then counts those that are gone as zeros",
    )
    blocks: bool = Field(
        default=False,
        description="whole residual blocks may go too: of a finished model with cut.repair those that have an identity "
        "shortcut, else those with layer scales that can turn them off",
    )
    importance: CutImportance = Field(
        default="magnitude",
        description="what channels are ranked by where masks are chosen at the cut: magnitude, the size of their "
        "filters (weighed by MACs unless one share is the target); or a criterion of Torch-Pruning: group_magnitude, "
        "bn_scale, lamp, fpgm, taylor, hessian, random. With cut.repair this is left out, and channels go by "
        "what least squares cannot make up for, or it is lasso: by when they enter a LASSO (He et al. 2017)",
    )
    importance_images: int = Field(
        default=256, ge=1, description="training images whose gradients taylor and hessian take"
    )


class FinetuneSpec(_Phase):
    """Training of the cut model, without penalty."""

    distill: DistillSpec | None = Field(
        default=None,
        description="learn from the dense model too, from the baseline if there is one; null or false: do not",
    )


class ExportSpec(StrictSpec):
    """The ONNX files."""

    opset: int | None = Field(
        default=None,
        ge=17,
        le=25,
        description="version of the ONNX operators; null is the exporter's default",
    )
    batch_size: int = Field(
        default=1, ge=1, description="batch size of the exported graph, and of the benchmark"
    )
    dynamic_batch: bool = Field(default=False, description="leave the batch size of the exported graph open")
    precisions: tuple[Precision, ...] = Field(
        default=(),
        description="export the pruned model in fewer bits too, int8 or fp16, timed and tested beside it",
    )
    calibration: int = Field(
        default=256,
        ge=1,
        description="number of training images that the ranges of int8 activations are taken from",
    )


class BenchmarkSpec(StrictSpec):
    """The measurement of latency in ONNX Runtime, at `export.batch_size`."""

    threads: int = Field(default=1, ge=1, description="number of threads of ONNX Runtime")
    rounds: int = Field(default=100, ge=10, description="number of timed runs of each model, interleaved")
    warmup: int = Field(default=10, ge=1, description="number of untimed runs of each model before them")
    provider: Provider = Field(
        default="cpu", description="what ONNX Runtime runs on; its package has to be installed"
    )


def nested_spec(info: FieldInfo) -> type[BaseModel] | None:
    """The spec that a field holds, or None for a plain value."""
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
