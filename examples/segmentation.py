"""A segmentation network of your own, to a speed: a U-Net, with its own loss and its own metric.

    python examples/segmentation.py

Draws squares, discs and triangles on noise, and trains a U-Net to tell for each pixel which of them it is in. Then
channels go to zero, those that a network 1.5 times as fast has to do without. They are cut out, also of the joined
maps of the skip connections; what is left is fine-tuned, exported and timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk

SIDE, CLASSES = 48, 4  # the background, and three shapes
EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)  # speed is that of one image at a time
Data = tuple[Tensor, Tensor]


def draw(n: int, generator: torch.Generator) -> Data:
    """New images (n, 3, side, side) with three shapes each, which may hide each other, and their classes by pixel."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    kinds = torch.randint(1, CLASSES, (n, 3), generator=generator)
    middles, halves = uniform(6, SIDE - 6, 3, 2), uniform(4, 10, 3, 2)
    places = torch.arange(SIDE) + 0.5
    x, y = (
        (places - middles[..., i, None]) / halves[..., i, None] for i in (0, 1)
    )  # -1 to 1 within the shape
    x, y = x[:, :, None, :], y[:, :, :, None]
    square = torch.maximum(x.abs(), y.abs()) < 1
    shapes = torch.stack([square, x**2 + y**2 < 1, square & (x.abs() < (1 + y) / 2)])
    images, colours = torch.zeros(n, 3, SIDE, SIDE), uniform(-1, 1, 3, 3)
    masks = torch.zeros(n, SIDE, SIDE, dtype=torch.long)
    for i in range(3):
        covered = shapes[kinds[:, i] - 1, torch.arange(n), i]
        images = torch.where(covered[:, None], colours[:, i, :, None, None], images)
        masks = torch.where(covered, kinds[:, i, None, None], masks)
    return images + uniform(-0.5, 0.5, 3, SIDE, SIDE), masks


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Twice a convolution, a norm and a ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions; what was seen on the way down is joined on the way up."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        steps = list(pairwise(widths))
        self.first = double(3, widths[0])
        self.down = nn.ModuleList(double(fine, coarse) for fine, coarse in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, 2) for fine, coarse in reversed(steps))
        self.join = nn.ModuleList(double(2 * fine, fine) for fine, _ in reversed(steps))
        self.last = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for down in self.down:
            maps.append(down(F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), maps.pop()], 1))
        return self.last(x)


def loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy, and the Dice loss of each class, in which small shapes count as much as large ones."""
    wanted = F.one_hot(masks, CLASSES).permute(0, 3, 1, 2)
    likely = logits.softmax(1)
    shared, both = (likely * wanted).sum((0, 2, 3)), (likely + wanted).sum((0, 2, 3))
    return F.cross_entropy(logits, masks) + (1 - 2 * shared / both).mean()


@torch.no_grad()
def mean_iou(model: nn.Module, data: Data) -> float:
    """Mean over the classes of the pixels that both have, by those that one has. All background gives 0.2."""
    images, masks = data
    guessed = torch.cat([model.eval()(some).argmax(1) for some in images.split(50)])
    counts = torch.bincount((masks * CLASSES + guessed).flatten(), minlength=CLASSES**2).view(
        CLASSES, CLASSES
    )
    both = counts.diag()
    return float((both / (counts.sum(0) + counts.sum(1) - both)).mean())


def train(
    model: nn.Module,
    steps: int,
    rate: float,
    generator: torch.Generator,
    after_step: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> None:
    """A bare loop on new images, with a place for one call after the optimizer's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model.train()
    for step in range(1, steps + 1):
        images, masks = draw(16, generator)
        optimizer.zero_grad()
        loss(model(images), masks).backward()
        optimizer.step()
        after_step(step, optimizer)
        scheduler.step()


def train_to_speed(
    model: nn.Module, steps: int, rate: float, generator: torch.Generator, speedup: float
) -> sk.ChannelGroups:
    """Take to zero what a model that is `speedup` times as fast has to do without; returns the groups, measured."""
    groups = sk.measure_layers(model, sk.find_groups(model, EXAMPLE), EXAMPLE)
    # The target holds the place of what the search finds, and nothing is shrunk before: the phase warms up.
    strength = sk.AutoStrength({"latency": 1 / speedup}, steps)
    sparsifier = sk.Sparsifier(model, groups, strength=strength)
    warm = round(strength.shares.warmup * steps) + 1

    def after_step(step: int, optimizer: torch.optim.Optimizer) -> None:
        sparsifier.step(optimizer)
        if step == warm:
            search = sk.search_speed(model, groups, sparsifier.importance(), EXAMPLE, speedup=speedup)
            print(f"found after {len(search.trials)} trials: {search.found.measured:.2f} times as fast")
            sparsifier.settle(search.masks)  # exactly these channels go

    train(model, steps, rate, generator, after_step)
    print(sparsifier.shortfall() or "all that was to go is zero")
    return groups


def main(output: Path, steps: int = 200, speedup: float = 1.5) -> None:
    """Train, sparsify to a speed, cut, fine-tune, export, measure; everything is written below `output`."""
    torch.manual_seed(0)
    drawn, test = torch.Generator().manual_seed(0), draw(200, torch.Generator().manual_seed(1))
    model = UNet()
    train(model, steps, 3e-3, drawn)
    dense = copy.deepcopy(model)
    train(dense, steps + steps // 2, 3e-3, drawn)  # to compare with: as long in total as the pruned model

    groups = train_to_speed(model, steps, 3e-3, drawn, speedup)
    plan = sk.make_plan(groups, sk.keep_masks(model, groups))
    pruned = sk.apply_plan(model, plan)
    agreement = sk.verify_cut(model, pruned, plan)  # raises if masked and cut model differ
    print(f"masked and cut model differ by {agreement.max_rel:.1e} of the largest output")
    train(pruned, steps // 2, 1e-3, drawn)  # a new optimizer for the new parameters

    sk.save(pruned, output / "pruned", plan=plan, factory=UNet)
    pruned = sk.load(output / "pruned", factory=UNet)
    files = []
    for name, shown in (("dense", dense), ("pruned", pruned)):
        print(f"{name}: mean IoU {mean_iou(shown, test):.3f}, {sk.count_params(shown):,} parameters")
        files.append(sk.export_onnx(shown, output / f"{name}.onnx", EXAMPLE))
    parity = sk.check_parity(pruned, files[1], test[0][:20])
    print(f"in ONNX Runtime {parity.top1_agreement:.2%} of the pixels are of the same class")
    latency = sk.compare_latency(files)
    (measured,) = latency.speedups
    print(
        f"speed-up asked {speedup:.2f}, measured {measured.value:.2f}, {measured.low:.2f} to {measured.high:.2f}"
    )
    if not latency.trustworthy:
        print(f"the timing is not trustworthy: {latency.reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="sparsekit on a segmentation network of your own, to a speed"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--steps", type=int, default=200, help="training steps before and while sparsifying")
    parser.add_argument("--speedup", type=float, default=1.5)
    arguments = parser.parse_args()
    main(arguments.output, arguments.steps, arguments.speedup)
