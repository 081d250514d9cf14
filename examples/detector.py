"""A detector of your own, to a speed: a network in the manner of YOLO, with its own loss and its own metric.

    python examples/detector.py

Draws squares, discs and triangles on noise, and trains a network to find them. Then channels go to zero, those that a
network 1.5 times as fast has to do without. They are cut out, what is left is fine-tuned, exported and timed. The
network ends in raw maps; how they become boxes stands outside, in torch for the loss and after ONNX Runtime for use.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, complete_box_iou_loss

import sparsekit as sk

SIDE, KINDS = 64, 3
EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)  # speed is that of one image at a time
Data = tuple[Tensor, Tensor, Tensor]


def draw(n: int, generator: torch.Generator) -> Data:
    """New images (n, 3, side, side), and of the four quarters of each a box (n, 4, 4) and a kind (n, 4); -1 is none."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    kinds = torch.randint(-1, KINDS, (n, 4), generator=generator)
    quarters = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]) * SIDE
    middles, halves = quarters + uniform(-6, 6, 4, 2), uniform(5, 12, 4, 2)
    boxes = torch.cat([middles - halves, middles + halves], 2)
    places = torch.arange(SIDE) + 0.5
    x, y = ((places - middles[..., i, None]) / halves[..., i, None] for i in (0, 1))  # -1 to 1 within the box
    x, y = x[:, :, None, :], y[:, :, :, None]
    square = torch.maximum(x.abs(), y.abs()) < 1
    shapes = torch.stack([square, x**2 + y**2 < 1, square & (x.abs() < (1 + y) / 2)])
    images, colours = uniform(-0.5, 0.5, 3, SIDE, SIDE), uniform(-1, 1, 4, 3)
    for i in range(4):
        covered = shapes[kinds[:, i], torch.arange(n), i] & (kinds[:, i] >= 0)[:, None, None]
        images += covered[:, None] * colours[:, i, :, None, None]
    return images, boxes, kinds


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Split(nn.Module):
    """Halves the channels, passes one half through a residual block, and joins all three parts (YOLOv8's C2f)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.into, self.out = conv(inputs, outputs, 1), conv(3 * half, outputs, 1)
        self.block = nn.Sequential(conv(half, half), conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.into(x).chunk(2, 1)
        return self.out(torch.cat([first, second, second + self.block(second)], 1))


class Pooled(nn.Module):
    """Joins a map with what it looks like pooled once, twice and three times (SPPF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = conv(width, width // 2, 1), conv(2 * width, width, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.into(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.out(torch.cat(maps, 1))


class Detector(nn.Module):
    """Looks at two strides, 8 and 16. Returns a raw map of each: (n, 4 + kinds, h, w), four distances and the kinds."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        narrow, fine, coarse = 2 * width, 4 * width, 8 * width
        self.stem = nn.Sequential(conv(3, width, 3, 2), conv(width, narrow, 3, 2), Split(narrow, narrow))
        self.to_fine = nn.Sequential(conv(narrow, fine, 3, 2), Split(fine, fine))
        self.to_coarse = nn.Sequential(conv(fine, coarse, 3, 2), Split(coarse, coarse), Pooled(coarse))
        self.up, self.join_fine = nn.Upsample(scale_factor=2), Split(fine + coarse, fine)
        self.down, self.join_coarse = conv(fine, fine, 3, 2), Split(fine + coarse, coarse)
        self.boxes = nn.ModuleList([self.head(fine, fine, 4), self.head(coarse, fine, 4)])
        self.kinds = nn.ModuleList([self.head(fine, fine, KINDS), self.head(coarse, fine, KINDS)])
        for kind in self.kinds:
            nn.init.constant_(kind[-1].bias, -4.0)  # at the start hardly anything is a shape

    @staticmethod
    def head(inputs: int, width: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, width), nn.Conv2d(width, outputs, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.to_fine(self.stem(x))
        coarse = self.to_coarse(fine)
        fine = self.join_fine(torch.cat([self.up(coarse), fine], 1))
        coarse = self.join_coarse(torch.cat([self.down(fine), coarse], 1))
        heads = zip((fine, coarse), self.boxes, self.kinds, strict=True)
        return [torch.cat([box(x), kind(x)], 1) for x, box, kind in heads]


def decode(heads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (n, cells, 4) and logits (n, cells, kinds) of raw maps; x, y and stride of the cells (cells, 3)."""
    cells = []
    for head in heads:
        stride = SIDE // head.shape[-1]
        places = (torch.arange(head.shape[-1]) + 0.5) * stride
        y, x = torch.meshgrid(places, places, indexing="ij")
        cells.append(torch.stack([x, y, torch.full_like(x, stride)], -1).flatten(0, 1))
    where, raw = torch.cat(cells), torch.cat([head.flatten(2) for head in heads], 2).transpose(1, 2)
    left_top, right_bottom = (F.softplus(raw[..., :4]) * where[:, 2:]).chunk(2, -1)
    return torch.cat([where[:, :2] - left_top, where[:, :2] + right_bottom], -1), raw[..., 4:], where


def loss(heads: list[Tensor], boxes: Tensor, kinds: Tensor) -> Tensor:
    """CIoU and cross-entropy. A box belongs to the cells around its middle, at stride 8 if it is small."""
    found, logits, where = decode(heads)
    away = (where[:, None, :2] - (boxes[:, None, :, :2] + boxes[:, None, :, 2:]) / 2).abs().amax(-1)
    small = (boxes[..., 2:] - boxes[..., :2]).amax(-1) < 16
    right_stride = small[:, None] == (where[:, 2, None] == 8)
    image, cell, i = torch.where((away < where[:, 2, None]) & right_stride & (kinds >= 0)[:, None])
    wanted = torch.zeros_like(logits)
    wanted[image, cell, kinds[image, i]] = 1.0
    of_boxes = complete_box_iou_loss(found[image, cell], boxes[image, i], reduction="sum")
    of_kinds = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    return (2 * of_boxes + of_kinds) / max(len(image), 1)


@torch.no_grad()
def average_precision(detect: Callable[[Tensor], list[Tensor]], data: Data) -> float:
    """Mean over the kinds of the area under precision against recall. A box is right from an IoU of 0.5."""
    images, boxes, kinds = data
    found, logits, _ = decode(detect(images))
    scores, guessed = logits.sigmoid().max(-1)
    rows = []  # of each box that is left: its score, its kind, whether it is right
    for i in range(len(images)):
        kept = batched_nms(found[i], scores[i], guessed[i], 0.5)  # the best first
        overlap = box_iou(found[i, kept], boxes[i]) * (guessed[i, kept, None] == kinds[i])
        for box, of_box in zip(kept, overlap, strict=True):
            most, match = of_box.max(0)
            rows.append([float(scores[i, box]), int(guessed[i, box]), float(most >= 0.5)])
            if most >= 0.5:
                overlap[:, match] = 0.0  # a second box on it is wrong
    by_score = torch.tensor(sorted(rows, reverse=True))
    areas = []
    for kind in range(KINDS):
        right = by_score[by_score[:, 1] == kind, 2]
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        best_from_here = precision.flip(0).cummax(0).values.flip(0)
        areas.append(float((best_from_here * right).sum() / (kinds == kind).sum()))
    return sum(areas) / KINDS


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
        images, boxes, kinds = draw(16, generator)
        optimizer.zero_grad()
        loss(model(images), boxes, kinds).backward()
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


def in_onnx_runtime(file: Path) -> Callable[[Tensor], list[Tensor]]:
    """A function that runs the file on images, one by one, and returns the raw maps as the model does."""
    session = onnxruntime.InferenceSession(file)

    def detect(images: Tensor) -> list[Tensor]:
        runs = [session.run(None, {"input": image.numpy()}) for image in images.split(1)]
        return [torch.cat([torch.from_numpy(head) for head in heads]) for heads in zip(*runs, strict=True)]

    return detect


def main(output: Path, steps: int = 300, speedup: float = 1.5) -> None:
    """Train, sparsify to a speed, cut, fine-tune, export, measure; everything is written below `output`."""
    torch.manual_seed(0)
    drawn, test = torch.Generator().manual_seed(0), draw(200, torch.Generator().manual_seed(1))
    model = Detector()
    train(model, steps, 3e-3, drawn)
    dense = copy.deepcopy(model)
    train(dense, steps + steps // 2, 3e-3, drawn)  # to compare with: as long in total as the pruned model

    groups = train_to_speed(model, steps, 3e-3, drawn, speedup)
    plan = sk.make_plan(groups, sk.keep_masks(model, groups))
    pruned = sk.apply_plan(model, plan)
    agreement = sk.verify_cut(model, pruned, plan)  # raises if masked and cut model differ
    print(f"masked and cut model differ by {agreement.max_rel:.1e} of the largest output")
    train(pruned, steps // 2, 1e-3, drawn)  # a new optimizer for the new parameters

    sk.save(pruned, output / "pruned", plan=plan, factory=Detector)
    pruned = sk.load(output / "pruned", factory=Detector)
    files = []
    for name, shown in (("dense", dense), ("pruned", pruned)):
        found = average_precision(shown.eval(), test)
        print(f"{name}: average precision {found:.3f}, {sk.count_params(shown):,} parameters")
        names = ("stride8", "stride16")
        files.append(sk.export_onnx(shown, output / f"{name}.onnx", EXAMPLE, output_names=names))
    found = average_precision(in_onnx_runtime(files[1]), test)
    print(f"pruned in ONNX Runtime: average precision {found:.3f}")
    latency = sk.compare_latency(files)
    (measured,) = latency.speedups
    print(
        f"speed-up asked {speedup:.2f}, measured {measured.value:.2f}, {measured.low:.2f} to {measured.high:.2f}"
    )
    if not latency.trustworthy:
        print(f"the timing is not trustworthy: {latency.reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="sparsekit on a detector of your own, to a speed")
    parser.add_argument("--output", type=Path, default=Path("runs/detector"))
    parser.add_argument("--steps", type=int, default=300, help="training steps before and while sparsifying")
    parser.add_argument("--speedup", type=float, default=1.5)
    arguments = parser.parse_args()
    main(arguments.output, arguments.steps, arguments.speedup)
