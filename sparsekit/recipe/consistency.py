"""Find contradictions: keys of a recipe that do not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sparsekit.recipe.specs import (
    BenchmarkSpec,
    CutSpec,
    DataSpec,
    DenseSpec,
    ExportSpec,
    FinetuneSpec,
    ModelSpec,
    SparsifySpec,
    TargetSpec,
    TrainingSpec,
)


@dataclass(frozen=True)
class Contradiction:
    """Values that are fine by themselves but not together; of `keys`, the first is the one to change."""

    keys: tuple[str, ...]
    text: str


class Sections(Protocol):
    """The sections of a recipe that are compared."""

    model: ModelSpec
    data: DataSpec
    training: TrainingSpec
    dense: DenseSpec
    sparsify: SparsifySpec
    cut: CutSpec
    finetune: FinetuneSpec
    export: ExportSpec
    benchmark: BenchmarkSpec


# Arguments of timm's models that a recipe says elsewhere.
_SAID_BY_DATA = {"num_classes": "the images", "in_chans": "data.in_chans", "img_size": "data.image_size"}


def contradictions(recipe: Sections) -> Iterator[Contradiction]:
    """All contradictions in a recipe."""
    yield from _model_contradictions(recipe)
    yield from _data_contradictions(recipe.data)
    yield from _split_contradictions(recipe.data)
    yield from _training_contradictions(recipe)
    yield from _cut_contradictions(recipe)
    yield from _export_contradictions(recipe)


def _model_contradictions(recipe: Sections) -> Iterator[Contradiction]:
    model = recipe.model
    if model.name is None and model.factory is None:
        yield Contradiction(
            ("model.name", "model.factory"),
            "model.name is required: a timm model name, such as resnet18; or model.factory, for a network of your own",
        )
    if model.pretrained and model.checkpoint is not None:
        yield Contradiction(
            ("model.checkpoint", "model.pretrained"),
            "model.pretrained and model.checkpoint exclude each other: the weights come from one place",
        )
    if model.factory is None:
        for key in (key for key in _SAID_BY_DATA if key in model.args):
            yield Contradiction(
                (f"model.args.{key}", "model.args"),
                f"model.args must not hold {key}, because it comes from {_SAID_BY_DATA[key]}; leave it out",
            )
        return
    if model.name is not None:
        yield Contradiction(
            ("model.factory", "model.name"),
            f"model.factory and model.name exclude each other, got {model.factory} and {model.name}: the model is your "
            "own or timm's; remove one",
        )
    if model.pretrained:
        yield Contradiction(
            ("model.pretrained", "model.factory"),
            f"model.pretrained means timm's weights, got true for the function {model.factory}; set model.checkpoint, "
            "or load the weights in the function",
        )
    if recipe.data.image_size is None:
        yield Contradiction(
            ("data.image_size", "model.factory"),
            "data.image_size is required where model.factory is set, because nothing else says it: height and width of "
            "an image in pixels",
        )


def _data_contradictions(data: DataSpec) -> Iterator[Contradiction]:
    if data.root is None and data.name != "digits":
        yield Contradiction(
            ("data.root", "data.name"),
            f"data.root is required where data.name is {data.name}: the folder to read",
        )
    if data.root is not None and data.name == "digits":
        yield Contradiction(
            ("data.root", "data.name"),
            f"data.root must be left out where data.name is digits (they are embedded), got '{data.root}'; "
            "to read a folder set data.name to folder",
        )
    for key, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != data.in_chans:
            yield Contradiction(
                (f"data.{key}", "data.in_chans"),
                f"data.{key} must have one number for each of the {data.in_chans} input channels, "
                f"got {len(values)}",
            )
    if data.augment is None:
        return
    for key, (low, high) in (("scale", data.augment.scale), ("ratio", data.augment.ratio)):
        if low > high or (key == "scale" and high > 1):
            limit = "low <= high <= 1" if key == "scale" else "low <= high"
            yield Contradiction(
                (f"data.augment.{key}",),
                f"data.augment.{key} must be [low, high] with {limit}, got [{low}, {high}]",
            )


def _split_contradictions(data: DataSpec) -> Iterator[Contradiction]:
    if data.name == "digits":
        for key, split in (("validation", data.validation), ("test", data.test)):
            if split is not None:
                yield Contradiction(
                    (f"data.{key}", "data.name"),
                    f"data.{key} must be null where data.name is digits, which are one set, got '{split}'; "
                    f"data.{key}_share says how much of it to take",
                )
    splits = (("train", data.train), ("validation", data.validation), ("test", data.test))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        (name, split), (other, other_split) = splits[first], splits[second]
        if split is not None and split == other_split:
            yield Contradiction(
                (f"data.{other}", f"data.{name}"),
                f"data.{other} must not be the same split as data.{name}, got '{split}' for both; "
                f"null takes a share of train",
            )
    taken = (data.validation_share if data.validation is None else 0) + (
        data.test_share if data.test is None else 0
    )
    if taken >= 1:
        yield Contradiction(
            ("data.validation_share", "data.test_share", "data.validation", "data.test"),
            "data.validation_share and data.test_share must leave images to train on (sum < 1), "
            f"got {data.validation_share} and {data.test_share}",
        )


def _training_contradictions(recipe: Sections) -> Iterator[Contradiction]:
    training, model = recipe.training, recipe.model
    # A function may load weights itself: whether it does is seen when it is called.
    timm_random = model.factory is None and not model.pretrained and model.checkpoint is None
    if recipe.dense.epochs == 0 and timm_random:
        yield Contradiction(
            ("dense.epochs", "model.pretrained", "model.checkpoint"),
            "dense.epochs 0 needs trained weights: set model.pretrained or model.checkpoint, "
            "or train for some epochs",
        )
    if not recipe.data.labels and recipe.dense.epochs:
        yield Contradiction(
            ("data.labels", "dense.epochs"),
            f"data.labels false needs dense.epochs 0, got {recipe.dense.epochs}: without labels the dense model cannot "
            "be trained, only a finished one can be made faster; set model.checkpoint or model.pretrained",
        )
    if not recipe.data.labels and recipe.data.name not in ("folder", "digits"):
        yield Contradiction(
            ("data.labels", "data.name"),
            f"data.labels false is for images in folders, got the data set {recipe.data.name}, which has labels; leave "
            "it out, or set data.name to folder",
        )
    if not recipe.data.labels and recipe.dense.baseline:
        yield Contradiction(
            ("dense.baseline", "data.labels"),
            "dense.baseline needs labels to train the dense model on, got data.labels false, where its own answers "
            "take their place; leave it out",
        )
    if (training.mixup or training.cutmix) and recipe.data.batch_size % 2:
        yield Contradiction(
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
            yield Contradiction(
                (f"{name}.warmup_epochs", f"{name}.epochs", "training.warmup_epochs"),
                f"{name}.warmup_epochs must be at most {name}.epochs, {phase.epochs}, or lr is never "
                f"reached, got {warmup:g}{source}",
            )
        lr = training.lr if phase.lr is None else phase.lr
        if phase.epochs and training.min_lr > lr:
            yield Contradiction(
                ("training.min_lr", f"{name}.lr", "training.lr", f"{name}.epochs"),
                f"training.min_lr must be at most the lr of {name}, {lr:g}, got {training.min_lr:g}",
            )


def _cut_contradictions(recipe: Sections) -> Iterator[Contradiction]:
    sparsify, cut = recipe.sparsify, recipe.cut
    shares = sparsify.warmup + sparsify.ramp + sparsify.debias
    if shares > 1 + 1e-9:
        yield Contradiction(
            ("sparsify.warmup", "sparsify.ramp", "sparsify.debias"),
            "sparsify.warmup, ramp and debias are shares of the phase and must sum to at most 1, "
            f"got {shares:g}",
        )
    if sparsify.strength == "auto" and sparsify.epochs > 0 and cut.target is None:
        yield Contradiction(
            ("cut.target", "sparsify.strength", "sparsify.epochs"),
            "cut.target is required where sparsify.strength is auto, for example {speedup: 2}; "
            "or give sparsify.strength a number",
        )
    if sparsify.strength == "auto" and sparsify.penalty == "group_mcp":
        yield Contradiction(
            ("sparsify.penalty", "sparsify.strength"),
            "sparsify.penalty group_mcp spares what is far from zero, so strength auto cannot take it there; auto "
            "shrinks no channel that is to stay, so take group_lasso, or give sparsify.strength a number",
        )
    if sparsify.strength == "auto" and sparsify.revive:
        yield Contradiction(
            ("sparsify.revive", "sparsify.strength"),
            "sparsify.revive is for a strength in numbers: auto chooses anew, until it has met its target, which "
            "channels go; leave revive out, or give sparsify.strength a number",
        )
    if cut.method == "budget" and cut.target is None:
        yield Contradiction(
            ("cut.method", "cut.target"), "cut.method budget needs cut.target, for example {macs: 0.5}"
        )
    if sparsify.epochs == 0 and (cut.method == "zeros" or (cut.method == "auto" and cut.target is None)):
        yield Contradiction(
            ("cut.method", "sparsify.epochs", "cut.target"),
            f"cut.method {cut.method} finds nothing to cut when sparsify.epochs is 0: no channel "
            "becomes zero; use threshold, gap or budget",
        )
    if not recipe.data.labels and cut.importance in ("taylor", "hessian"):
        yield Contradiction(
            ("cut.importance", "data.labels"),
            f"cut.importance {cut.importance} takes gradients at labels, got data.labels false; use cut.repair or "
            "another importance",
        )
    yield from _importance_contradictions(sparsify, cut)
    yield from _curves_contradictions(sparsify, cut)
    yield from _repair_contradictions(sparsify, cut)
    yield from _threshold_contradictions(cut)
    if cut.target is not None:
        yield from _target_contradictions(recipe, cut.target)


def _importance_contradictions(sparsify: SparsifySpec, cut: CutSpec) -> Iterator[Contradiction]:
    if cut.importance == "lasso":
        if cut.repair is None or sparsify.epochs:
            yield Contradiction(
                ("cut.importance", "cut.repair", "sparsify.epochs"),
                "cut.importance lasso needs cut.repair of a finished model (sparsify.epochs 0): it ranks channels by "
                "what is repaired; set cut.repair to auto, or choose another importance",
            )
        return
    learned = sparsify.strength == "auto" and sparsify.epochs > 0
    if cut.importance != "magnitude" and (learned or cut.method == "zeros"):
        reason = (
            "cut.method zeros ranks nothing"
            if cut.method == "zeros"
            else "sparsify.strength auto chooses in training"
        )
        yield Contradiction(
            ("cut.importance", "sparsify.strength", "cut.method"),
            f"cut.importance is read where masks are chosen at the cut, got {cut.importance} although {reason}; see "
            "sparsify.importance, or leave cut.importance out",
        )


def _curves_contradictions(sparsify: SparsifySpec, cut: CutSpec) -> Iterator[Contradiction]:
    if sparsify.importance != "curves":
        return
    if sparsify.strength != "auto" or sparsify.epochs == 0:
        got = "sparsify.epochs 0" if sparsify.epochs == 0 else f"a strength of {sparsify.strength:g}"
        yield Contradiction(
            ("sparsify.importance", "sparsify.strength", "sparsify.epochs"),
            f"sparsify.importance curves chooses what strength auto takes to zero, got {got}; leave it out "
            "(cut.repair chooses by curves without training)",
        )
    given = [key for key, value in cut.target or () if value is not None and key != "max_accuracy_drop"]
    if len(given) == 1 and given[0] in ("macs", "params", "channels"):
        yield Contradiction(
            ("sparsify.importance", "cut.target"),
            "sparsify.importance curves needs a cut.target of a speed or of several shares, where the masks of all "
            f"groups are chosen together, got {given[0]} alone, which is met by a threshold; take taylor or magnitude",
        )


def _repair_contradictions(sparsify: SparsifySpec, cut: CutSpec) -> Iterator[Contradiction]:
    if cut.repair is None:
        return
    if cut.recalibrate:
        yield Contradiction(
            ("cut.recalibrate", "cut.repair"),
            f"cut.recalibrate is what cut.repair makes needless, got {cut.recalibrate} images for it: the repair fits "
            "what every layer reads after the cut; leave one out",
        )
    if sparsify.epochs:  # the channels are chosen as without repair
        return
    if cut.target is None or cut.target.max_accuracy_drop is not None:
        yield Contradiction(
            ("cut.repair", "cut.target"),
            "cut.repair of a finished model (sparsify.epochs 0) needs a cut.target of speedup, latency_ms, macs, "
            "params or channels, for example {speedup: 1.5}",
        )
    if cut.method not in ("auto", "budget") or cut.importance not in ("magnitude", "lasso"):
        yield Contradiction(
            ("cut.repair", "cut.method", "cut.importance"),
            "cut.repair chooses the channels of a finished model (sparsify.epochs 0) by itself: leave cut.method out, "
            "and cut.importance too, or set it to lasso",
        )


def _threshold_contradictions(cut: CutSpec) -> Iterator[Contradiction]:
    keys = ("cut.threshold", "cut.method")
    if cut.method == "threshold" and cut.threshold is None:
        yield Contradiction(
            ("cut.method", "cut.threshold"), "cut.method threshold needs cut.threshold, a number > 0"
        )
    if cut.method != "threshold" and cut.threshold is not None:
        yield Contradiction(
            keys,
            f"cut.threshold is read only where cut.method is threshold, got method {cut.method}; remove one",
        )
    if cut.threshold is not None and cut.relative and cut.threshold >= 1:
        yield Contradiction(
            ("cut.threshold", "cut.relative"),
            "cut.threshold must be a number < 1, a fraction of the largest importance, where cut.relative is "
            f"true, got {cut.threshold:g}",
        )


def _target_contradictions(recipe: Sections, target: TargetSpec) -> Iterator[Contradiction]:
    sparsify, cut = recipe.sparsify, recipe.cut
    given = [key for key, value in target if value is not None]
    fast = bool({"speedup", "latency_ms"} & set(given)) or given == ["max_accuracy_drop"]
    if not given:
        yield Contradiction(
            ("cut.target", *(f"cut.target.{key}" for key in TargetSpec.model_fields)),
            f"cut.target must have one of {', '.join(TargetSpec.model_fields)}, got none",
        )
    if target.speedup is not None and target.latency_ms is not None:
        yield Contradiction(
            ("cut.target.speedup", "cut.target.latency_ms", "cut.target"),
            "cut.target must have one of speedup and latency_ms, got both; "
            "to replace one write cut.target={latency_ms: 5}",
        )
    if fast and recipe.benchmark.provider != "cpu":
        yield Contradiction(
            ("cut.target", "benchmark.provider"),
            "cut.target is a speed on the CPU, where layers can be timed one by one, got benchmark.provider "
            f"{recipe.benchmark.provider}; ask for macs or params, or leave provider out",
        )
    chosen = len(given) > 1 or fast
    if chosen and cut.method not in ("auto", "budget"):
        yield Contradiction(
            ("cut.method", "cut.target"),
            f"cut.method {cut.method} cannot reach a speed, an accuracy or several shares, got a cut.target of "
            f"{' and '.join(given)}; use auto or budget",
        )
    if chosen and sparsify.weigh_by != "size":
        yield Contradiction(
            ("sparsify.weigh_by", "cut.target"),
            f"sparsify.weigh_by is read only where cut.target is one share, got {sparsify.weigh_by} for "
            f"{' and '.join(given)}: there what channels cost is part of the choice; leave it out",
        )


def _export_contradictions(recipe: Sections) -> Iterator[Contradiction]:
    if "int8" in recipe.export.precisions and recipe.export.calibration < recipe.export.batch_size:
        yield Contradiction(
            ("export.calibration", "export.batch_size"),
            f"export.calibration must be at least export.batch_size, {recipe.export.batch_size}, got "
            f"{recipe.export.calibration}",
        )
