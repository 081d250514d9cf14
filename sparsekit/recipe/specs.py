"""The sections of a recipe, as typed, closed and frozen specs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic.fields import FieldInfo

from sparsekit.options import (
    Importance,
    Interpolation,
    LearnedImportance,
    MaskMethod,
    Penalty,
    Precision,
    Provider,
    Schedule,
    WeighBy,
)


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
_ARGUMENTS: dict[str, JsonValue] = {
    "expected": "a mapping of names to numbers, texts, true/false, null or lists of these"
}
_DATASET: dict[str, JsonValue] = {
    "expected": "digits, folder, or a timm dataset name such as torch/cifar10 or hfds/owner/name"
}


class StrictSpec(BaseModel):
    """Closed (unknown keys are refused), frozen, and strict (the text '3' is not the number 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSpec(StrictSpec):
    """The architecture and where its weights come from."""

    name: Name = Field(description="timm model name, such as resnet18")
    pretrained: bool = Field(default=False, description="start from timm's pretrained weights (a download)")
    checkpoint: UserPath | None = Field(default=None, description="start from this safetensors file")
    args: Arguments = Field(
        default_factory=dict,
        description="further arguments of timm.create_model, such as drop_path_rate",
        json_schema_extra=_ARGUMENTS,
    )


class AugmentSpec(StrictSpec):
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


class DataSpec(StrictSpec):
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
    interpolation: Interpolation | None = Field(
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


class TrainingSpec(StrictSpec):
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


class _Phase(StrictSpec):
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

    penalty: Penalty = Field(
        default="group_lasso",
        description="group_lasso: channels as whole vectors; l1: single weights; scale_l1: BatchNorm scales; "
        "sparse_group_lasso: both; group_mcp: channels, without shrinking those far from zero",
    )
    strength: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        default="auto", description="coefficient of the penalty; auto steers it towards cut.target"
    )
    importance: LearnedImportance = Field(
        default="taylor",
        description="what decides which channels strength auto takes: taylor, their effect on the loss, learned from "
        "the gradients of the warmup and after; magnitude, the size of their filters at the start",
    )
    weigh_by: WeighBy = Field(
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


class TargetSpec(StrictSpec):
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


class CutSpec(StrictSpec):
    """Which channels go."""

    method: MaskMethod = Field(
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
    importance: Importance = Field(
        default="magnitude",
        description="what channels are ranked by where masks are chosen at the cut: magnitude, the norms of their "
        "filters; or a criterion of Torch-Pruning: group_magnitude, bn_scale, lamp, fpgm, taylor, hessian, random",
    )
    importance_images: int = Field(
        default=256, ge=1, description="training images whose gradients taylor and hessian take"
    )


class DistillSpec(StrictSpec):
    """Learning from the dense model's logits: (1 - weight) CE + weight T^2 KL."""

    weight: Share = Field(default=0.5, description="weight of the dense model's answer against the labels")
    temperature: float = Field(default=2.0, gt=0, description="temperature of both distributions")


class FinetuneSpec(_Phase):
    """Training of the cut model, without penalty."""

    distill: DistillSpec | None = Field(
        default=None,
        description="learn from the dense model too (the baseline, if there is one); null or false for not",
    )


class ExportSpec(StrictSpec):
    """The ONNX files."""

    opset: int | None = Field(
        default=None, ge=17, le=25, description="ONNX opset; null is the exporter's default"
    )
    batch_size: int = Field(default=1, ge=1, description="batch of the exported graph, and of the benchmark")
    dynamic_batch: bool = Field(default=False, description="leave the batch dimension open")
    precisions: tuple[Precision, ...] = Field(
        default=(), description="the pruned model in fewer bits too, timed and tested beside it"
    )
    calibration: int = Field(
        default=256, ge=1, description="training images that the ranges of int8 activations are taken from"
    )


class BenchmarkSpec(StrictSpec):
    """The latency measurement in ONNX Runtime, at the batch of `export`."""

    threads: int = Field(default=1, ge=1, description="threads of ONNX Runtime")
    rounds: int = Field(default=100, ge=10, description="timed runs of each model, interleaved")
    warmup: int = Field(default=10, ge=1, description="untimed runs of each model before them")
    provider: Provider = Field(
        default="cpu", description="execution provider of ONNX Runtime for this measurement"
    )


def nested_spec(info: FieldInfo) -> type[BaseModel] | None:
    """The spec that a field holds, or None for a plain value."""
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
