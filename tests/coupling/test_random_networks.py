"""Networks drawn at random from the operators that people use: each free group can be cut in every way."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from models_by_hand import ways_to_cut
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.silu,
    F.gelu,
    lambda x: x * torch.sigmoid(x),
    lambda x: F.leaky_relu(x, 0.1),
)


class Plain(nn.Module):
    """A convolution, a norm or none, an activation."""

    def __init__(self, draw: random.Random, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, draw.choice((1, 3)), padding="same", bias=draw.random() < 0.5)
        self.norm = nn.BatchNorm2d(out) if draw.random() < 0.7 else nn.Identity()
        self.act = draw.choice(ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    """Two convolutions and a shortcut, as wide as the stream."""

    def __init__(self, draw: random.Random, width: int, out: int) -> None:
        super().__init__()
        inner = draw.choice((6, 8))
        self.first, self.second = Plain(draw, width, inner), Plain(draw, inner, out)
        self.shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))


class Excited(nn.Module):
    """An expanded depthwise convolution with a squeeze and excitation."""

    def __init__(self, draw: random.Random, width: int, out: int) -> None:
        super().__init__()
        inner = draw.choice((8, 12))
        self.expand, self.project = Plain(draw, width, inner), nn.Conv2d(inner, out, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.squeeze, self.excite = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x)).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.project(x * gate)


class Joined(nn.Module):
    """Two branches side by side, one of them pooled and enlarged again, and what came in."""

    def __init__(self, draw: random.Random, width: int, out: int) -> None:
        super().__init__()
        self.one, self.two = Plain(draw, width, draw.choice((4, 6))), Plain(draw, width, draw.choice((3, 5)))
        joined = self.one.conv.out_channels + self.two.conv.out_channels + width
        self.mix = nn.Conv2d(joined, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.interpolate(self.two(F.max_pool2d(x, 2)), scale_factor=2.0)
        return self.mix(torch.cat([self.one(x), pooled, x], 1))


class Grouped(nn.Module):
    """A grouped convolution between two others, with the channels of its groups shuffled or not."""

    def __init__(self, draw: random.Random, width: int, out: int) -> None:
        super().__init__()
        self.before, self.after = Plain(draw, width, 12), nn.Conv2d(12, out, 1)
        self.conv_groups = draw.choice((2, 3, 4))
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=self.conv_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.grouped(self.before(x)).relu())


class Attended(nn.Module):
    """Attention over the places of a map, with its sizes in attributes, a number, or computed."""

    def __init__(self, draw: random.Random, width: int, out: int) -> None:
        super().__init__()
        self.heads, self.written = 3, draw.random() < 0.5
        self.qkv, self.project = nn.Linear(width, 3 * 12), nn.Linear(12, out)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2))
        qkv = qkv.reshape(b, h * w, 3, 3, 4) if self.written else qkv.reshape(b, h * w, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.project(mixed).transpose(1, 2).unflatten(2, (h, w))


class Summed(nn.Module):
    """What came in, divided by a norm over its channels, beside the product of two layers, added up."""

    def __init__(self, draw: random.Random, width: int, out: int) -> None:
        super().__init__()
        self.one, self.two = Plain(draw, width, 6), nn.Conv2d(width, 6, 1)
        self.order, self.scale = draw.choice((1.0, 2.0)), nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.mix = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        product = (self.one(x) * self.two(x)).sum(1, keepdim=True)
        return self.mix(self.scale * F.normalize(x, self.order, 1)) + product


BLOCKS = (Plain, Residual, Excited, Joined, Grouped, Attended, Summed)


class Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        widths = [3, *(draw.choice((6, 8, 9)) for _ in range(4))]
        # Each kind of block comes first in one of seven networks.
        kinds = [BLOCKS[seed % len(BLOCKS)], *draw.choices(BLOCKS, k=3)]
        self.blocks = nn.ModuleList(
            kind(draw, one, other) for kind, one, other in zip(kinds, widths, widths[1:], strict=False)
        )
        self.flat = draw.random() < 0.5
        self.head = nn.Linear(widths[-1] * (64 if self.flat else 1), 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


@pytest.mark.parametrize("seed", range(8))
def test_each_free_group_can_be_cut_alone_with_others_and_to_one_unit(seed: int) -> None:
    torch.manual_seed(seed)
    model = Network(seed).double().eval()
    groups = sk.find_groups(model, torch.randn(1, 3, 8, 8, dtype=torch.float64), round_to=1, min_channels=1)
    assert len(groups.free) >= 3
    assert all(group.least == 1 for group in groups.free)
    for masks in ways_to_cut(groups):
        plan = sk.make_plan(groups, masks)
        assert sk.verify_cut(model, sk.apply_plan(model, plan), plan, tolerance=1e-9).max_rel < 1e-9
