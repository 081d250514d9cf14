"""CIFAR-10: accuracy at equal measured speed, our penalties against their peers and against dense training.

    python benchmarks/cifar10.py --data DIR --seeds 0 1

DIR holds the tars (or folders) cifar10_train and cifar10_val of class folders. All arms of a seed start from one dense
network and see the same images, changed in the same way, in the same order, at the same learning rates, for the same
number of epochs:

    start      the dense network                              --start epochs
    sparsify   with the arm's penalty, or none                --sparsify epochs
    cut        to the speed asked for
    finetune   without penalty, learning from the dense       --finetune epochs
               network's answers too (--no-distill: not)

    dense                        no penalty, no cut
    dense_untaught               the same, and no teacher
    group_lasso, scale_l1, l1    sparsekit's penalties, proximal, with an automatic strength
    linear_decay, growing_l2     the same choice of channels, taken to zero without a penalty: multiplied down in equal
                                 parts (as HESSO, arXiv 2409.09085, does), or by a weight decay that grows to 1 (as
                                 GReg, arXiv 2012.09243, does)
    tp_group_norm, tp_bn_scale   Torch-Pruning's GroupNormPruner and BNScalePruner, with their authors' coefficients
    magnitude                    one-shot, Torch-Pruning's global magnitude pruning
    random                       one-shot, steps of channels drawn from all layers alike

The cut of every arm is the smallest (channels in multiples of 16) that ONNX Runtime runs `asked` times as
fast as the dense network, measured interleaved with it, one thread. Ours takes the measurement at the end of the
warm-up (`sparsekit.search_speed`, which asks for 1.5 % more than `asked` because it settles for 1 % less than it was
asked for) and then trains for what was measured; the peers take it at the cut.

A tenth of the training images, and those over --n-train, are set aside for choices: `--judge validation` was used while
the method was worked on, with another seed. So was the weight decay, for the dense network: with a quarter of it
Torch-Pruning's regulariser gains from being some more. The figures are those of the test images, looked at once an arm.

Training is in bfloat16 autocast and channels_last. Results are written after every arm; `--resume` goes on.
The page is written at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch_pruning as tp
from channels import PenalisedChannels
from common import Labelled, machine_text, save_figure, versions_text, write_json, write_text
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from timm.data.readers.reader_factory import create_reader
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk

HERE = Path(__file__).parent
Row = Mapping[str, Any]
Masks = dict[str, Tensor]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MULTIPLE = 16
BATCH = 128
TIMED_BATCH = 16
# Ours asks for this much more: a search ends within 1 % of what it was asked for.
MARGIN = 1.015
# Weight of the teacher and temperature, as recipes have them by default.
DISTILLATION = (0.5, 2.0)
PENALTIES = ("group_lasso", "scale_l1", "l1")
# Coefficients: reproduce/main.py of Torch-Pruning; network slimming's on CIFAR.
PEERS: dict[str, tuple[Any, Any, float]] = {
    "tp_group_norm": (tp.pruner.GroupNormPruner, tp.importance.GroupMagnitudeImportance, 5e-4),
    "tp_bn_scale": (tp.pruner.BNScalePruner, tp.importance.BNScaleImportance, 1e-4),
}
# The same choice, without a penalty.
FADES = ("linear_decay", "growing_l2")
DENSE = ("dense", "dense_untaught")
ARMS = (*DENSE, *PENALTIES, *FADES, *PEERS, "magnitude", "random")


# ---- network and images ----------------------------------------------------------------------------------------------


def build_network(width: int) -> ResNet:
    """timm's ResNet with a stem for 32 px: four stages of one basic block, 1 to 4 times `width` channels."""
    network = ResNet(
        BasicBlock, (1, 1, 1, 1), num_classes=10, channels=(width, 2 * width, 3 * width, 4 * width)
    )
    network.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.maxpool = nn.Identity()
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    # The first convolution reads `width` channels whatever timm's stem had.
    first = network.layer1[0]
    first.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
    first.downsample = None
    for module in network.modules():
        if isinstance(module, BasicBlock):
            nn.init.ones_(module.bn2.weight)  # timm starts it at zero; a penalty would take that for dead
    return network


@dataclass(frozen=True)
class Cifar:
    """Images as uint8 (n, 3, 32, 32) and labels (n,)."""

    train: Labelled
    judged: Labelled


def read_images(folder: Path, n_train: int | None, judge: str, device: str) -> Cifar:
    """All images in the device's memory, for training `n_train` of the nine tenths that are not set aside for choices.

    Where validation images judge, those are the tenth and what training leaves.
    """

    images, labels = read_split(folder, "cifar10_train")
    rng = np.random.default_rng(0)
    every = np.arange(len(labels))
    aside = drawn(labels, every, round(0.1 * len(labels)), rng)
    left = np.setdiff1d(every, aside)
    chosen = left if n_train is None or n_train >= len(left) else drawn(labels, left, n_train, rng)
    if judge == "test":
        judged = read_split(folder, "cifar10_val")
    else:
        others = np.concatenate([aside, np.setdiff1d(left, chosen)])
        judged = images[others], labels[others]

    def moved(images: np.ndarray, labels: np.ndarray) -> Labelled:
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return pictures.to(device), torch.from_numpy(labels).to(device)

    return Cifar(moved(images[chosen], labels[chosen]), moved(*judged))


def read_split(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels (n,) of class folders in a tar, or in a folder."""
    tar = folder / f"{name}.tar"
    # timm would keep the index of a tar in a pickle beside it.
    reader: Any = (
        create_reader("", root=str(tar), cache_tarinfo=False)
        if tar.is_file()
        else create_reader("", root=str(folder / name))
    )
    read = [reader[i] for i in range(len(reader))]
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file, _ in read]
    return np.stack(pictures), np.array([label for _, label in read], dtype=np.int64)


def drawn(labels: np.ndarray, among: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the positions `among`, sorted, each class in proportion; the largest remainders get the odd ones."""
    classes, sizes = np.unique(labels[among], return_counts=True)
    exact = sizes * (count / len(among))
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: count - int(quota.sum())]] += 1
    picked = [rng.permutation(among[labels[among] == c])[:n] for c, n in zip(classes, quota, strict=True)]
    return np.sort(np.concatenate(picked))


def normalised(images: Tensor) -> Tensor:
    """float32, channels last."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    scaled = (images.float() / 255 - mean) / std
    return scaled.contiguous(memory_format=torch.channels_last)


def batches(data: Labelled, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A training epoch: shuffled, flipped and shifted by up to 4 px, the same for everyone who asks."""
    images, labels = data
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(images), generator=generator)
    for chunk in order.split(BATCH):
        if len(chunk) < BATCH:
            return
        flip = torch.rand(len(chunk), generator=generator) < 0.5
        shift = torch.randint(9, (len(chunk), 2), generator=generator)
        rows = shift[:, :1] + torch.arange(32)
        columns = shift[:, 1:] + torch.arange(32)
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        chunk, rows, columns = (part.to(images.device) for part in (chunk, rows, columns))
        padded = F.pad(images[chunk], (4, 4, 4, 4))
        index = torch.arange(len(chunk), device=images.device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        yield normalised(cropped), labels[chunk]


# ---- training --------------------------------------------------------------------------------------------------------

After = Callable[[torch.optim.Optimizer], None]


def taught_loss(hard: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of labels and of a teacher (Hinton et al. 2015, arXiv 1503.02531), logits being (n, classes)."""
    weight, temperature = DISTILLATION
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * hard + weight * temperature**2 * soft


def train(
    model: nn.Module,
    data: Labelled,
    *,
    seed: int,
    epochs: range,
    lr: float,
    weight_decay: float,
    before_step: Callable[[nn.Module], object] | None = None,
    after_step: After | None = None,
    answers: Callable[[int], Tensor] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """SGD with Nesterov momentum; the rate rises for a tenth of the steps and falls linearly to 0.

    `answers` gives a teacher's logits for the images of an epoch, in their order.
    """
    device = data[0].device
    model.to(device, memory_format=torch.channels_last).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others}],
        lr=lr,
        momentum=0.9,
        nesterov=True,
    )
    total = len(epochs) * (len(data[0]) // BATCH)
    warmup = max(total // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(total - step, 0) / (total - warmup))
    )
    for epoch in epochs:
        taught = answers(epoch).split(BATCH) if answers is not None else None
        for number, (images, labels) in enumerate(batches(data, seed, epoch)):
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            if taught is not None:
                loss = taught_loss(loss, logits.float(), taught[number])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if before_step is not None:
                before_step(model)
            optimizer.step()
            if after_step is not None:
                after_step(optimizer)
            schedule.step()
        tick()
    model.cpu()


@torch.no_grad()
def accuracy(model: nn.Module, data: Labelled) -> float:
    """Fraction of the images classified right, in float32."""
    model.to(data[0].device).eval()
    right = 0
    for images, labels in zip(data[0].split(1000), data[1].split(1000), strict=True):
        right += int((model(normalised(images)).argmax(1) == labels).sum())
    model.cpu()
    return right / len(data[1])


# ---- speed -----------------------------------------------------------------------------------------------------------


@dataclass
class Speed:
    """Measures how much faster than the dense network a cut one runs; equal shapes are measured once in a search."""

    dense: nn.Module
    folder: Path
    known: dict[tuple[Any, ...], sk.Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._export(self.dense, "dense.onnx")

    def _export(self, model: nn.Module, name: str) -> Path:
        plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
        return sk.export_onnx(plain, self.folder / name, torch.zeros(TIMED_BATCH, 3, 32, 32))

    def of(self, model: nn.Module, *, rounds: int = 60) -> sk.Interval:
        """Speed-up with its interval; looked up for a search (60 rounds), measured anew for more."""
        key = tuple(tuple(p.shape) for p in model.parameters())
        if rounds > 60 or key not in self.known:
            files = [self.folder / "dense.onnx", self._export(model, "cut.onnx")]
            self.known[key] = sk.compare_latency(files, threads=1, rounds=rounds).speedups[0]
        return self.known[key]


def cut_to_speed(cut_at: Callable[[float], nn.Module], asked: float, speed: Speed) -> nn.Module:
    """The first cut that is fast enough, of shares to remove in steps of 1 %; `cut_at` takes the share.

    No bisection: a share that empties a layer can make a peer leave it whole.
    """
    dense = sk.count_macs(speed.dense, EXAMPLE)
    for percent in range(1, 100):
        try:
            candidate = cut_at(percent / 100)
        except sk.InputError:  # more than there is to remove
            break
        # What has nearly all of its multiply-accumulates left needs no stopwatch.
        if dense / sk.count_macs(candidate, EXAMPLE) < 1 + 0.7 * (asked - 1):
            continue
        if speed.of(candidate).value >= asked:
            return candidate
    raise sk.InputError(f"no cut reaches a speed-up of {asked}")


# ---- the arms --------------------------------------------------------------------------------------------------------

EXAMPLE = torch.zeros(1, 3, 32, 32)


def groups_of(model: nn.Module) -> sk.ChannelGroups:
    """Of which every arm keeps a multiple."""
    return sk.find_groups(model, EXAMPLE, round_to=MULTIPLE, min_channels=MULTIPLE)


def by_masks(
    model: nn.Module, masks_at: Callable[[float], Masks], groups: sk.ChannelGroups
) -> Callable[[float], nn.Module]:
    """A cut of sparsekit, proved."""

    def cut(level: float) -> nn.Module:
        masks = sk.keep_carriers(model, groups, masks_at(level))
        plan = sk.make_plan(groups, masks)
        pruned = sk.apply_plan(model, plan)
        sk.verify_cut(model, pruned, plan)
        return pruned

    return cut


def cut_zeros_first(model: nn.Module, asked: float, speed: Speed) -> nn.Module:
    """Exactly the zeros if that is fast enough; else the least important channels as well."""
    groups = groups_of(model)

    def masks_at(level: float) -> Masks:
        method: Literal["budget", "zeros"] = "budget" if level else "zeros"
        return sk.keep_masks(model, groups, method=method, target={"macs": 1 - level})

    cut_at = by_masks(model, masks_at, groups)
    zeros = cut_at(0.0)
    return zeros if speed.of(zeros).high >= asked else cut_to_speed(cut_at, asked, speed)


def at_random(model: nn.Module, seed: int) -> Callable[[float], nn.Module]:
    """Steps of channels drawn from all groups alike; the first of each group stays."""
    groups = groups_of(model)
    generator = torch.Generator().manual_seed(seed)
    ranks = {
        g.name: torch.rand(-(-g.n_channels // MULTIPLE), generator=generator)
        .index_fill(0, torch.tensor([0]), 1.0)
        .repeat_interleave(MULTIPLE)[: g.n_channels]
        for g in groups.free
    }
    return by_masks(model, lambda level: {name: rank >= level for name, rank in ranks.items()}, groups)


def by_peer(model: nn.Module, importance: Any, at_most: float) -> Callable[[float], nn.Module]:
    """Torch-Pruning's cut: global, in the same multiples, the classifier left alone, no layer cut by over `at_most`."""

    def cut(level: float) -> nn.Module:
        pruned = copy.deepcopy(model)
        pruner = tp.pruner.MagnitudePruner(
            pruned,
            EXAMPLE,
            importance=importance(),
            global_pruning=True,
            pruning_ratio=level,
            max_pruning_ratio=at_most,
            round_to=MULTIPLE,
            ignored_layers=[pruned.fc],
        )
        pruner.step()
        return pruned

    return cut


def peer_cut_to_speed(model: nn.Module, importance: Any, asked: float, speed: Speed) -> nn.Module:
    """As `cut_to_speed`; where no share is fast enough, with layers cut by less (one to be emptied is left whole)."""
    for at_most in (0.95, 0.85, 0.75, 0.65):
        with contextlib.suppress(sk.InputError):
            return cut_to_speed(by_peer(model, importance, at_most), asked, speed)
    raise sk.InputError(f"no cut of Torch-Pruning reaches a speed-up of {asked}")


def fade_(
    channels: PenalisedChannels,
    masks: Masks,
    arm: str,
    step: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """A step (counted from 1) of `steps` that take what `masks` drop to zero without a penalty, or one after them."""
    if arm == "linear_decay":
        left = max(steps - step, 0) / (max(steps - step, 0) + 1)
    else:
        settings = optimizer.param_groups[0]
        left = 1 - settings["lr"] / (1 - settings["momentum"]) * min(step / steps, 1.0)
    channels.multiply_(torch.where(channels.join(masks), 1.0, left))


@dataclass
class Seed:
    """What the arms of one seed share."""

    number: int
    data: Cifar
    arguments: argparse.Namespace
    speed: Speed
    cache: Path
    tick: Callable[[], None]
    known_answers: dict[int, Tensor] = field(default_factory=dict)

    def answers(self, epoch: int) -> Tensor:
        """Logits of the network that was trained without a penalty, for the images of an epoch."""
        if epoch not in self.known_answers:
            device = self.data.train[0].device
            teacher = self.without_penalty().to(device, memory_format=torch.channels_last).eval()
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                logits = [
                    teacher(images).float() for images, _ in batches(self.data.train, self.number, epoch)
                ]
            self.known_answers[epoch] = torch.cat(logits)
        return self.known_answers[epoch]

    def phase(self, name: str) -> dict[str, Any]:
        """Epochs and rate of a phase; the images of epoch 7 are the same for every arm."""
        a = self.arguments
        first = {"start": 0, "sparsify": a.start, "finetune": a.start + a.sparsify}[name]
        length = {"start": a.start, "sparsify": a.sparsify, "finetune": a.finetune}[name]
        return {
            "seed": self.number,
            "epochs": range(first, first + length),
            "lr": a.lr if name == "start" else a.lr / 2,
            "weight_decay": a.weight_decay,
            "tick": self.tick,
        }

    def trained(self, key: str, make: Callable[[], nn.Module]) -> nn.Module:
        """What `make` trains, or what it trained before."""
        a = self.arguments
        size = f"w{a.width}-n{a.n_train}-{a.start}-{a.sparsify}-{a.finetune}-lr{a.lr}-wd{a.weight_decay}"
        file = self.cache / f"{key}-seed{self.number}-{size}.safetensors"
        if file.exists():
            model = build_network(a.width)
            model.load_state_dict(load_file(file))
            return model
        model = make()
        self.cache.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
        return model

    def start(self) -> nn.Module:
        """The network that all arms start from."""

        def make() -> nn.Module:
            torch.manual_seed(self.number)
            model = build_network(self.arguments.width)
            train(model, self.data.train, **self.phase("start"))
            return model

        return self.trained("start", make)

    def without_penalty(self) -> nn.Module:
        """Through the second phase without penalty."""

        def make() -> nn.Module:
            model = self.start()
            train(model, self.data.train, **self.phase("sparsify"))
            return model

        return self.trained("plain", make)

    def with_peer(self, arm: str) -> nn.Module:
        """With Torch-Pruning's regulariser between the backward pass and the step, as its documentation has it."""

        def make() -> nn.Module:
            model = self.start()
            kind, importance, coefficient = PEERS[arm]
            pruner = kind(
                model,
                EXAMPLE,
                importance=importance(),
                reg=coefficient,
                global_pruning=True,
                round_to=MULTIPLE,
                ignored_layers=[model.fc],
            )
            train(
                model,
                self.data.train,
                before_step=pruner.regularize,
                **self.phase("sparsify"),
            )
            return model

        return self.trained(arm, make)

    def with_penalty(self, arm: Any, asked: float) -> nn.Module:
        """Ours, and what differs from it only in how the chosen channels go to zero.

        When the warm-up is over, the phase settles on the masks that keep most of what is fast enough.
        """

        def make() -> nn.Module:
            model = self.start()
            timed = torch.zeros(TIMED_BATCH, 3, 32, 32)
            groups = sk.measure_layers(model, groups_of(model), timed)
            model.to(self.data.train[0].device)
            steps = self.arguments.sparsify * (len(self.data.train[0]) // BATCH)
            shares = sk.PhaseShares(*self.arguments.shares)
            strength = sk.AutoStrength({"latency": 1 / asked}, steps, shares, self.arguments.importance)
            penalty = "group_lasso" if arm in FADES else arm
            sparsifier = sk.Sparsifier(model, groups, penalty, strength=strength)
            channels = PenalisedChannels(model, groups)
            look, last = round(shares.warmup * steps) + 1, round((1 - shares.debias) * steps)
            step, masks = 0, Masks()

            def after_step(optimizer: torch.optim.Optimizer) -> None:
                nonlocal step, masks
                step += 1
                if arm in FADES and step > look:
                    fade_(channels, masks, arm, step - look, last - look, optimizer)
                    return
                sparsifier.step(optimizer)
                if step == look:
                    masks = sk.search_speed(
                        copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format),
                        groups,
                        sparsifier.importance(),
                        timed,
                        speedup=MARGIN * asked,
                    ).masks
                    sparsifier.settle(masks)

            train(
                model,
                self.data.train,
                after_step=after_step,
                **self.phase("sparsify"),
            )
            return model

        a = self.arguments
        shares = "-".join(f"{share:g}" for share in a.shares)
        return self.trained(f"{arm}-{asked:g}-{a.importance}-{shares}", make)

    def cut(self, arm: str, model: nn.Module, asked: float) -> nn.Module:
        """The arm's smallest cut that is fast enough."""
        if arm in PEERS:
            return peer_cut_to_speed(model, PEERS[arm][1], asked, self.speed)
        if arm == "magnitude":
            return peer_cut_to_speed(model, tp.importance.GroupMagnitudeImportance, asked, self.speed)
        if arm == "random":
            return cut_to_speed(at_random(model, self.number), asked, self.speed)
        return cut_zeros_first(model, asked, self.speed)

    def run(self, arm: str, asked: float) -> dict[str, Any]:
        """One row of the results."""
        row: dict[str, Any] = {"arm": arm, "seed": self.number, "asked": asked}
        if arm in (*PENALTIES, *FADES):
            model = self.with_penalty(arm, asked)
        else:
            model = self.with_peer(arm) if arm in PEERS else self.without_penalty()
        before = accuracy(model, self.data.judged)
        cut = copy.deepcopy(model) if arm in DENSE else self.cut(arm, model, asked)
        after = accuracy(cut, self.data.judged)
        speed = sk.Interval(1.0, 1.0, 1.0) if arm in DENSE else self.speed.of(cut, rounds=200)
        ratio = sk.count_macs(model, EXAMPLE) / sk.count_macs(cut, EXAMPLE)
        answers = self.answers if self.arguments.distill and arm != "dense_untaught" else None
        train(cut, self.data.train, answers=answers, **self.phase("finetune"))
        return row | {
            "accuracy_before_cut": before,
            "accuracy_after_cut": after,
            "accuracy": accuracy(cut, self.data.judged),
            "speedup": speed.value,
            "speedup_low": speed.low,
            "speedup_high": speed.high,
            "macs_ratio": ratio,
            "params_ratio": sum(p.numel() for p in model.parameters())
            / sum(p.numel() for p in cut.parameters()),
        }


# ---- results ---------------------------------------------------------------------------------------------------------


def by_arm(rows: Sequence[Row], asked: float) -> dict[str, list[Row]]:
    """The rows of each arm at a speed, in the order of `ARMS`."""
    return {
        arm: sorted(found, key=lambda row: int(row["seed"]))
        for arm in ARMS
        if (found := [r for r in rows if (r["arm"], r["asked"]) == (arm, asked)])
    }


def mean(rows: Sequence[Row], key: str) -> float:
    """Over the seeds."""
    return statistics.mean(row[key] for row in rows)


def spread(rows: Sequence[Row]) -> float:
    """Largest less smallest accuracy of the seeds."""
    return float(max(r["accuracy"] for r in rows) - min(r["accuracy"] for r in rows))


def claims(rows: Sequence[Row]) -> list[str]:
    """What the figures say about our penalties, each with what it should be; over the seeds that both sides have."""
    said = []
    for asked in sorted({row["asked"] for row in rows} - {1.0}):
        for arm, ours in by_arm(rows, asked).items():
            if arm not in PENALTIES:
                continue
            lost = max(abs(r["accuracy_before_cut"] - r["accuracy_after_cut"]) for r in ours)
            text = f"{arm} at {asked:g}x: largest change of accuracy at the cut {lost:.4f} (0.0005 allowed)"
            seeds = {row["seed"] for row in ours}
            leads = {}
            for peer, all_theirs in (by_arm(rows, asked) | by_arm(rows, 1.0)).items():
                theirs = {row["seed"]: row["accuracy"] for row in all_theirs if row["seed"] in seeds}
                if theirs and peer not in (*PENALTIES, *FADES):
                    leads[peer] = [
                        row["accuracy"] - theirs[row["seed"]] for row in ours if row["seed"] in theirs
                    ]
            if against := leads.pop("dense", None):
                text += f"; {-statistics.mean(against):.4f} below dense"
                text += " (0.01 allowed)" if asked == 2 else ""
            if against := leads.pop("dense_untaught", None):
                text += f", {-statistics.mean(against):.4f} below dense without a teacher"
            if leads:
                best = min(leads, key=lambda peer: statistics.mean(leads[peer]))
                each = ", ".join(f"{lead:+.4f}" for lead in leads[best])
                text += f"; against the best peer, {best}, {statistics.mean(leads[best]):+.4f} (seed by seed {each}); "
                text += (
                    f"the spread of its own seeds is {spread(ours):.4f}"
                    if len(ours) > 1
                    else "the spread is unknown"
                )
            said.append(f"- {text}")
    return said


def page(rows: Sequence[Row], settings: Mapping[str, Any], picture: str) -> str:
    """The results as Markdown: for each arm and speed, means over the seeds and their spread."""
    versions = versions_text("torch", "timm", "torch-pruning", "onnxruntime")
    lines = [
        "# CIFAR-10: accuracy at equal measured speed",
        "",
        "Written by `python benchmarks/cifar10.py --data DIR`, whose docstring says what each arm does. Accuracy is "
        "that on the images named below: before the cut, right after it, and after fine-tuning; means over the seeds, "
        "and the spread (largest less smallest) of the last. Dense training goes on for as many epochs.",
        "",
        "- settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()),
        f"- machine: {machine_text()}; versions: {versions}",
        "",
        f"![accuracy against measured speed-up]({picture})",
        "",
        "| asked | arm | seeds | before the cut | after it | fine-tuned | spread | speed-up | MACs | parameters |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for asked in sorted({row["asked"] for row in rows}):
        for arm, found in by_arm(rows, asked).items():
            accuracies = " | ".join(
                f"{mean(found, key):.4f}" for key in ("accuracy_before_cut", "accuracy_after_cut", "accuracy")
            )
            lines.append(
                f"| {asked:g} | {arm} | {', '.join(str(r['seed']) for r in found)} | {accuracies} "
                f"| {spread(found):.4f} | {mean(found, 'speedup'):.2f} | {mean(found, 'macs_ratio'):.2f} "
                f"| {mean(found, 'params_ratio'):.2f} |"
            )
    return "\n".join([*lines, "", *claims(rows), ""])


def plot(rows: Sequence[Row], file: Path) -> None:
    """Accuracy over measured speed-up, right after the cut and after fine-tuning; a point for each seed."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4))
    shown = {"accuracy_after_cut": "right after the cut", "accuracy": "fine-tuned"}
    for panel, (key, title) in zip(panels, shown.items(), strict=True):
        for number, arm in enumerate(arm for arm in ARMS if any(r["arm"] == arm for r in rows)):
            found = [r for r in rows if r["arm"] == arm]
            panel.scatter(
                [r["speedup"] for r in found],
                [r[key] for r in found],
                label=arm,
                color=f"C{number}",
                marker="o" if arm in PENALTIES else "s" if arm in FADES else "x",
            )
        panel.set(title=title, xlabel="measured speed-up", ylabel="accuracy")
    panels[1].legend(fontsize=8)
    save_figure(figure, file)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="accuracy at equal measured speed on CIFAR-10")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of cifar10_train.tar and cifar10_val.tar"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--asked", type=float, nargs="+", default=[2.0, 3.0], help="speed-ups")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--width", type=int, default=48, help="channels of the first stage")
    parser.add_argument("--n-train", type=int, default=36_000, help="of 45,000 training images")
    parser.add_argument("--start", type=int, default=8, help="epochs of dense training before")
    parser.add_argument("--sparsify", type=int, default=3, help="epochs with penalty")
    parser.add_argument("--finetune", type=int, default=3, help="epochs after the cut")
    parser.add_argument("--judge", choices=("test", "validation"), default="test", help="images for accuracy")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument(
        "--weight-decay", type=float, default=2e-3, help="of filters, not of scales and shifts"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs=3,
        default=[0.05, 0.1, 0.55],
        help="warm-up, ramp and debias of the phase",
    )
    parser.add_argument(
        "--distill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fine-tuning learns from the dense network too",
    )
    parser.add_argument("--importance", choices=("magnitude", "taylor"), default="taylor")
    parser.add_argument("--device", default="cpu", help="for training; speed is measured on the CPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("runs") / "cifar10", help="trained networks")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cifar10.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "results" / "cifar10.md")
    return parser.parse_args()


def main() -> None:
    """Run the arms, print and write the rows."""
    a = parse()
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    console = Console()
    rows: list[dict[str, Any]] = json.loads(a.output.read_text()) if a.resume and a.output.exists() else []
    data = read_images(a.data, a.n_train, a.judge, a.device)
    shown = (
        "width",
        "start",
        "sparsify",
        "finetune",
        "lr",
        "weight_decay",
        "distill",
        "shares",
        "importance",
        "device",
        "threads",
    )
    settings = {key: getattr(a, key) for key in shown} | {
        "training images": len(data.train[0]),
        "batch": BATCH,
        "judged on": f"{len(data.judged[0])} {a.judge} images",
    }
    wanted = [(s, arm, x) for s in a.seeds for arm in a.arms for x in ([1.0] if arm in DENSE else a.asked)]
    done = {(row["seed"], row["arm"], row["asked"]) for row in rows}
    with TemporaryDirectory() as folder, Progress(console=console) as progress:
        speed = Speed(build_network(a.width), Path(folder))
        task = progress.add_task("cifar10", total=None)
        shared: dict[int, Seed] = {}
        for number, arm, asked in wanted:
            if (number, arm, asked) in done:
                continue
            progress.update(task, description=f"seed {number}, {arm}, {asked:g}x")
            seed = shared.setdefault(
                number, Seed(number, data, a, speed, a.cache, lambda: progress.advance(task))
            )
            started = time.perf_counter()
            rows.append(seed.run(arm, asked) | {"seconds": round(time.perf_counter() - started)})
            write_json(a.output, rows)
            text = ", ".join(
                f"{k} {v:.4f}" for k, v in rows[-1].items() if isinstance(v, float) and math.isfinite(v)
            )
            progress.console.print(f"seed {number}, {arm}: {text}", highlight=False, soft_wrap=True)
    write_text(a.docs, page(rows, settings, a.docs.with_suffix(".svg").name))
    plot(rows, a.docs.with_suffix(".svg"))


if __name__ == "__main__":
    main()
