"""sparsekit in a training loop of your own, to a speed: say how much faster, and get what runs that much faster.

    python examples/speed_in_your_loop.py

As `own_training_loop.py`, with the same digits and network. But what is to go is chosen once the first steps have shown
which channels matter: by cutting copies, exporting them, and timing them in ONNX Runtime. Takes a minute or two on one
core.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk

EXAMPLE = torch.zeros(16, 3, 32, 32)  # speed is that of batches of 16
Data = tuple[Tensor, Tensor]


def digits() -> Data:
    """The 1,797 digits in a fixed random order: images (n, 3, 32, 32) in [-1, 1] and labels (n,)."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return images[order], torch.tensor(raw.target)[order]


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Fraction of right answers in eval mode."""
    return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


def train(
    model: nn.Module,
    data: Data,
    steps: int,
    rate: float,
    after_step: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> None:
    """A bare loop, with a place for one call after the optimizer's step, which is told how many there were."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(data[0]), (64,))
        loss = F.cross_entropy(model(data[0][chosen]), data[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step(step, optimizer)
        scheduler.step()


def train_to_speed(model: nn.Module, data: Data, steps: int, speedup: float) -> sk.ChannelGroups:
    """Take to zero what a model that is `speedup` times as fast has to do without; returns the groups, measured."""
    groups = sk.measure_layers(model, sk.find_groups(model, EXAMPLE), EXAMPLE)
    # The target holds the place of what the search finds, and nothing is shrunk before: the phase warms up.
    strength = sk.AutoStrength({"latency": 1 / speedup}, steps)
    sparsifier = sk.Sparsifier(model, groups, strength=strength)
    warm = round(strength.shares.warmup * steps) + 1

    def after_step(step: int, optimizer: torch.optim.Optimizer) -> None:
        sparsifier.step(optimizer)
        if step == warm:
            still = copy.deepcopy(model).cpu()  # timed on the CPU, wherever the model trains
            search = sk.search_speed(still, groups, sparsifier.importance(), EXAMPLE, speedup=speedup)
            print(f"found after {len(search.trials)} trials: {search.found.measured:.2f} times as fast")
            sparsifier.settle(search.masks)  # exactly these channels go

    train(model, data, steps, rate=0.05, after_step=after_step)
    print(sparsifier.shortfall() or "all that was to go is zero")
    return groups


def main(output: Path, steps: int = 300, speedup: float = 1.5) -> None:
    """Train, sparsify to a speed, cut, fine-tune, export, measure; everything is written below `output`."""
    torch.manual_seed(0)
    images, labels = digits()
    training, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    model = timm.create_model("test_resnet", num_classes=10)
    train(model, training, steps, rate=0.05)
    dense = copy.deepcopy(model)

    groups = train_to_speed(model, training, steps, speedup)
    plan = sk.make_plan(groups, sk.keep_masks(model, groups))
    pruned = sk.apply_plan(model, plan)
    sk.verify_cut(model, pruned, plan)  # raises if masked and cut model differ
    train(pruned, training, steps // 2, rate=0.02)  # a new optimizer for the new parameters

    files = []
    for name, shown in (("dense", dense), ("pruned", pruned)):
        print(f"{name}: accuracy {accuracy(shown, test):.3f}, {sk.count_params(shown):,} parameters")
        files.append(sk.export_onnx(shown, output / f"{name}.onnx", EXAMPLE))
    latency = sk.compare_latency(files, rounds=50)
    (measured,) = latency.speedups
    print(
        f"speed-up asked {speedup:.2f}, measured {measured.value:.2f}, {measured.low:.2f} to {measured.high:.2f}"
    )
    if not latency.trustworthy:
        print(f"the timing is not trustworthy: {latency.reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="sparsekit in a training loop of your own, to a speed")
    parser.add_argument("--output", type=Path, default=Path("runs/speed_in_your_loop"))
    parser.add_argument("--steps", type=int, default=300, help="training steps before and while sparsifying")
    parser.add_argument("--speedup", type=float, default=1.5)
    arguments = parser.parse_args()
    main(arguments.output, arguments.steps, arguments.speedup)
