"""Trains three dense networks on CIFAR-10 from scratch; their weights are the finished models of other benchmarks.

    python benchmarks/finished_weights.py --data DIR --output DIR
    python benchmarks/finished_weights.py --data DIR --pack cifar10.npz      all images in one file, for another machine
    python benchmarks/finished_weights.py --data cifar10.npz --output DIR --device cuda

    resnet56    the CIFAR ResNet-56 of He et al. (arXiv 1512.03385) with twice the channels, and convolutions as the
                shortcuts between its stages
    vit         timm's vit_tiny_patch16_224 for 32 px: patches of 4 px, 9 blocks, 192 features, 3 heads
    convnext    timm's convnext_atto with a stem of 2 px

ResNet-56 learns by SGD with Nesterov momentum, from images cropped and flipped at random. The other two learn by AdamW,
and half of their batches are CutMix (arXiv 1905.04899), a quarter mixup (arXiv 1710.09412). The rate rises for a tenth
of the steps and falls to 0 along a cosine; labels are smoothed by 0.1. Training is in bfloat16 autocast and
channels_last, with all images in the device's memory.

The weights are those of the last step: no test image is looked at before. Each file, NAME.safetensors, is written as
soon as its network is done. It holds matrices and filters in float16, vectors in float32, and in its metadata how the
network was trained and the accuracy of what the file holds, computed in float32.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import timm
import torch
from common import Labelled, whole
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = ("resnet56", "vit", "convnext")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 512
SMOOTHING = 0.1
WIDTH = 2
# Steps before the stopwatch starts, and steps it takes, where a time is given instead of epochs.
UNTIMED, TIMED = 10, 20


# ---- networks --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them; ReLU after the addition.

    With random weights it is its shortcut: the last scale starts at zero, or 27 blocks would not bear a high rate.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        nn.init.zeros_(self.bn2.weight)
        self.shortcut = (
            nn.Identity()
            if (n_in, stride) == (n_out, 1)
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of `depth` blocks, of 16, 32 and 64 channels times `width`."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        channels = [16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        stages, n_in = [], channels[0]
        for n_out in channels:
            blocks = [Block(n_in, n_out, stride=1 if n_in == n_out else 2)]
            blocks += [Block(n_out, n_out, stride=1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            n_in = n_out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(n_in, len(CLASSES))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.head(features.mean((2, 3)))


def build(name: str) -> nn.Module:
    """One of `MODELS` with random weights: (n, 3, 32, 32), normalised by `MEAN` and `STD`, to (n, 10) logits."""
    if name == "resnet56":
        return CifarResNet(depth=9, width=WIDTH)
    if name == "vit":
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, depth=9, num_classes=len(CLASSES)
        )
    if name == "convnext":
        return timm.create_model("convnext_atto", patch_size=2, num_classes=len(CLASSES))
    raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Encoded images, each as the bytes of its file, and labels (n,)."""

    files: list[bytes]
    labels: np.ndarray

    def decode(self) -> np.ndarray:
        """Pixels, (n, 32, 32, 3)."""
        return np.stack([np.asarray(picture) for picture in self.pictures()])

    def pictures(self) -> list[Image.Image]:
        """One after the other, each of its own size."""
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in self.files]

    def at(self, chosen: np.ndarray) -> Stored:
        """Those at some positions."""
        return Stored([self.files[i] for i in chosen], self.labels[chosen])


def read_tar(file: Path) -> Stored:
    """The images of a tar of class folders; the labels count the folders in the order of their names."""
    from timm.data.readers.reader_factory import create_reader

    # timm would keep the index of a tar in a pickle beside it.
    reader = create_reader("", root=str(file), cache_tarinfo=False)
    read = [reader[i] for i in range(len(reader))]
    return Stored([image.read() for image, _ in read], np.array([label for _, label in read]))


def pack(folder: Path, file: Path) -> None:
    """Write the images of both tars into one npz: the bytes of their files end to end, with the size of each."""
    arrays = {}
    for split, tar in (("train", "cifar10_train.tar"), ("test", "cifar10_val.tar")):
        stored = read_tar(folder / tar)
        arrays[f"{split}_images"] = np.frombuffer(b"".join(stored.files), dtype=np.uint8)
        arrays[f"{split}_sizes"] = np.array([len(image) for image in stored.files], dtype=np.int32)
        arrays[f"{split}_labels"] = stored.labels.astype(np.uint8)
    with whole(file) as unfinished, unfinished.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def read_stored(source: Path, split: str) -> Stored:
    """The files of "train" or "test", not decoded yet, out of a folder of tars or an npz of `pack`."""
    if source.is_dir():
        return read_tar(source / f"cifar10_{'val' if split == 'test' else split}.tar")
    with np.load(source) as packed:
        images, labels = packed[f"{split}_images"], packed[f"{split}_labels"]
        ends = packed[f"{split}_sizes"].cumsum()
    return Stored([part.tobytes() for part in np.split(images, ends[:-1])], labels)


def read_split(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels (n,) of "train" or "test", out of a folder of tars or an npz.

    An npz may also hold the pixels themselves.
    """
    if not source.is_dir():
        with np.load(source) as packed:
            if packed[f"{split}_images"].ndim == 4:
                return packed[f"{split}_images"], packed[f"{split}_labels"]
    stored = read_stored(source, split)
    return stored.decode(), stored.labels


def read_images(source: Path, split: str, limit: int | None, device: str) -> Labelled:
    """As uint8 (n, 32, 32, 3) with labels (n,), in the device's memory; `limit` of them, from all classes."""
    images, labels = read_split(source, split)
    if limit is not None and limit < len(labels):
        chosen = np.linspace(0, len(labels) - 1, limit).astype(np.int64)
        images, labels = images[chosen], labels[chosen]
    return torch.from_numpy(images).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)


def normaliser(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Makes float32 (n, 3, 32, 32), channels last in memory, of uint8 (n, 32, 32, 3).

    Its constants are moved to the device once: moved at every step, they would wait for the step before.
    """
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    return lambda images: ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def cropped(padded: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """The images at `chosen`, each shifted by up to 4 px and flipped or not; `padded` has 4 px around every image."""
    where = {"device": padded.device, "generator": generator}
    shift = torch.randint(9, (2, len(chosen), 1), **where)
    flip = torch.rand((len(chosen), 1), **where) < 0.5
    rows, columns = shift + torch.arange(SIDE, device=padded.device)
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def mix_(images: Tensor, rng: np.random.Generator) -> float:
    """Mix each image with the one before it, in place; returns the share that is left of its own.

    CutMix in half of all calls, mixup in a quarter, nothing in the rest.
    """
    others = images.roll(1, 0)
    draw = rng.random()
    if draw < 0.5:
        half = SIDE * math.sqrt(rng.random()) / 2
        centre = rng.uniform(0, SIDE, 2)
        top, left = np.clip(np.round(centre - half), 0, SIDE).astype(int)
        bottom, right = np.clip(np.round(centre + half), 0, SIDE).astype(int)
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return 1 - float((bottom - top) * (right - left)) / SIDE**2
    if draw < 0.75:
        share = float(rng.beta(0.4, 0.4))
        images.lerp_(others, 1 - share)
        return share
    return 1.0


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """How a network is trained: by SGD or AdamW, the highest rate, the decay of matrices and filters, mixed or not."""

    adam: bool
    lr: float
    weight_decay: float
    mixed: bool


HABITS = {
    "resnet56": Habits(adam=False, lr=0.2, weight_decay=1e-3, mixed=False),
    "vit": Habits(adam=True, lr=1e-3, weight_decay=0.05, mixed=True),
    "convnext": Habits(adam=True, lr=2e-3, weight_decay=0.05, mixed=True),
}


def make_optimizer(model: nn.Module, habits: Habits) -> torch.optim.Optimizer:
    """Vectors (scales, shifts, biases) are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": habits.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if habits.adam:
        return torch.optim.AdamW(groups, lr=habits.lr, fused=True)
    return torch.optim.SGD(groups, lr=habits.lr, momentum=0.9, nesterov=True, fused=True)


def steps_an_epoch(data: Labelled) -> int:
    """Whole batches only."""
    return len(data[0]) // min(BATCH, len(data[0]))


def steps(model: nn.Module, data: Labelled, habits: Habits, *, epochs: int, seed: int) -> Iterator[Tensor]:
    """Train in place; gives the loss of each step, on the device, as it is done."""
    device = data[0].device
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, habits)
    total = epochs * steps_an_epoch(data)
    warmup = max(total // 10, 1)

    def rate(step: int) -> float:
        fallen = max(step - warmup, 0) / max(total - warmup, 1)
        return min((step + 1) / warmup, (1 + math.cos(math.pi * fallen)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    padded = F.pad(data[0], (0, 0, 4, 4, 4, 4))
    normalised = normaliser(device)
    for _ in range(epochs):
        order = torch.randperm(len(padded), device=device, generator=generator)
        for chosen in order.split(min(BATCH, len(padded)))[: steps_an_epoch(data)]:
            images, labels = normalised(cropped(padded, chosen, generator)), data[1][chosen]
            share = mix_(images, rng) if habits.mixed else 1.0
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(images).float()
            loss = share * F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
            if share < 1:
                others = F.cross_entropy(logits, labels.roll(1), label_smoothing=SMOOTHING)
                loss = loss + (1 - share) * others
            optimizer.zero_grad()
            loss.backward()
            if habits.adam:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield loss.detach()


def count_epochs(model: nn.Module, data: Labelled, habits: Habits, seconds: float) -> int:
    """How many epochs fit into a time that has begun to run: some steps of a copy are timed."""
    started = time.perf_counter()
    rehearsal = steps(copy.deepcopy(model), data, habits, epochs=UNTIMED + TIMED, seed=0)
    # Reading a loss waits for the device.
    torch.stack(list(islice(rehearsal, UNTIMED))).sum().item()
    timed = time.perf_counter()
    torch.stack(list(islice(rehearsal, TIMED))).sum().item()
    ended = time.perf_counter()
    an_epoch = (ended - timed) / TIMED * steps_an_epoch(data)
    return max(int((seconds - (ended - started)) / an_epoch), 1)


@torch.no_grad()
def accuracy(model: nn.Module, data: Labelled) -> float:
    """Fraction of the images classified right, in float32."""
    model.to(data[0].device, memory_format=torch.channels_last).eval()
    normalised = normaliser(data[0].device)
    right = [
        (model(normalised(images)).argmax(1) == labels).sum()
        for images, labels in zip(data[0].split(1000), data[1].split(1000), strict=True)
    ]
    return int(torch.stack(right).sum()) / len(data[1])


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """On the CPU: matrices and filters in float16, the rest as it is."""
    return {
        name: (tensor.half() if tensor.dim() > 1 else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }


def finish(name: str, train: Labelled, test: Labelled, arguments: argparse.Namespace) -> None:
    """Train one network and write its weights."""
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    model, habits = build(name), HABITS[name]
    epochs = arguments.epochs or count_epochs(model, train, habits, arguments.seconds)
    losses = steps(model, train, habits, epochs=epochs, seed=arguments.seed)
    for epoch in range(1, epochs + 1):
        loss = torch.stack(list(islice(losses, steps_an_epoch(train)))).mean().item()
        seconds = time.perf_counter() - started
        print(f"{name}: epoch {epoch} of {epochs}, loss {loss:.4f}, {seconds:.1f} s", flush=True)
    weights = stored_weights(model)
    finished = build(name)
    finished.load_state_dict(weights)
    reached = accuracy(finished, test)
    metadata = {
        "model": name,
        "dtype": "matrices and filters in float16, vectors in float32",
        "accuracy": f"{reached:.4f}",
        "test_images": f"{len(test[0])}",
        "training_images": f"{len(train[0])}",
        "epochs": f"{epochs}",
        "batch": f"{min(BATCH, len(train[0]))}",
        "seed": f"{arguments.seed}",
        "habits": f"{habits}",
        "seconds": f"{time.perf_counter() - started:.0f}",
        "device": torch.cuda.get_device_name() if train[0].is_cuda else "cpu",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    file = arguments.output / f"{name}.safetensors"
    with whole(file) as unfinished:
        save_file(weights, unfinished, metadata=metadata)
    size = file.stat().st_size / 2**20
    print(
        f"{name}: accuracy {reached:.4f} on {len(test[0])} test images; {file} ({size:.1f} MiB)", flush=True
    )


# ---- command ---------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="train and store three dense networks of CIFAR-10")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of cifar10_train.tar and cifar10_val.tar, or an npz written by --pack",
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--output", type=Path, help="folder for the weights")
    wanted.add_argument(
        "--pack",
        type=Path,
        metavar="FILE",
        help="only write all images of the tars into this npz; nothing is lost, their files are kept as they are",
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int)
    length.add_argument(
        "--seconds",
        type=float,
        default=150.0,
        help="for each network, instead of epochs: as many as fit, by a measurement of its first steps",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--limit", type=int, help="as many training images, and test images, at most")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Pack the images, or train the networks one after the other."""
    a = parse()
    if a.pack is not None:
        pack(a.data, a.pack)
        print(f"{a.pack}: {a.pack.stat().st_size / 2**20:.1f} MiB")
        return
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    train, test = (read_images(a.data, split, a.limit, a.device) for split in ("train", "test"))
    print(f"{len(train[0])} training and {len(test[0])} test images", flush=True)
    for name in a.model:
        finish(name, train, test, a)


if __name__ == "__main__":
    main()
