"""sparsekit in a training loop of your own: from a plain PyTorch model to a smaller and faster ONNX file.

    python examples/own_training_loop.py

Trains a small timm ResNet on scikit-learn's handwritten digits while channels are shrunk to exact zeros, cuts them
out, fine-tunes what is left, exports both models and times them. It takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk

EXAMPLE = torch.zeros(1, 3, 32, 32)


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits in a fixed random order: images (n, 3, 32, 32) in [-1, 1] and labels (n,)."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return images[order], torch.tensor(raw.target)[order]


def batches(images: Tensor, labels: Tensor, steps: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` random batches."""
    for _ in range(steps):
        chosen = torch.randint(len(images), (size,))
        yield images[chosen], labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of right answers in eval mode."""
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    rate: float,
    sparsifier: sk.Sparsifier | None = None,
) -> None:
    """A bare loop. All that sparsekit asks for is one call after the optimizer's step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model.train()
    for batch, wanted in batches(images, labels, steps):
        loss = F.cross_entropy(model(batch), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step(optimizer)
        scheduler.step()


def main(output: Path, steps: int = 300) -> None:
    """Train, sparsify, cut, fine-tune, save, export, measure; everything is written below `output`."""
    torch.manual_seed(0)
    images, labels = digits()
    training, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    model = timm.create_model("test_resnet", num_classes=10)
    train(model, *training, steps, rate=0.05)
    dense = copy.deepcopy(model)

    groups = sk.find_groups(model, EXAMPLE, round_to=8)
    sparsifier = sk.Sparsifier(model, groups, strength=sk.AutoStrength({"macs": 0.4}, steps))
    train(model, *training, steps, rate=0.05, sparsifier=sparsifier)

    plan = sk.make_plan(groups, sk.keep_masks(model, groups))  # pure data, with a JSON form
    pruned = sk.apply_plan(model, plan)  # a new, smaller nn.Module
    agreement = sk.verify_cut(model, pruned, plan)  # raises if masked and cut model differ
    train(pruned, *training, steps // 2, rate=0.02)  # a new optimizer for the new parameters

    sk.save(pruned, output / "pruned", plan=plan)
    pruned = sk.load(output / "pruned")
    files = [
        sk.export_onnx(dense, output / "dense.onnx", EXAMPLE),
        sk.export_onnx(pruned, output / "pruned.onnx", EXAMPLE),
    ]
    latency = sk.compare_latency(files, rounds=50)

    print(f"{'':10}{'test accuracy':>15}{'parameters':>12}{'latency (ms)':>14}")
    for name, shown, timed in zip(("dense", "pruned"), (dense, pruned), latency.latencies, strict=True):
        parameters = sum(parameter.numel() for parameter in shown.parameters())
        print(f"{name:10}{accuracy(shown, *test):>15.3f}{parameters:>12,}{timed.median_ms:>14.3f}")
    print(f"speed-up {latency.speedups[0].value:.2f} in ONNX Runtime, batch 1, {latency.threads} thread")
    if not latency.trustworthy:
        print(f"the timing is not trustworthy: {latency.reason}")
    print(f"masked and cut model differ by {agreement.max_rel:.1e} of the largest logit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/own_training_loop"), help="folder to write to"
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps before and while sparsifying")
    arguments = parser.parse_args()
    main(arguments.output, arguments.steps)
