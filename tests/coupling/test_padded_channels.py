"""Channels that meet constants which a padding adds: what lies opposite them stays, or shrinks with their number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plain import find_groups
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk


class Apply(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class PadBy(nn.Module):
    """The number of zeros on both sides, or on one, is an attribute."""

    def __init__(self, extra: int, sides: int) -> None:
        super().__init__()
        self.extra, self.sides = extra // sides, sides

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra if self.sides == 2 else 0
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.extra))


class JoinZeros(nn.Module):
    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2)
        return torch.cat([x, x.new_zeros(len(x), self.extra, *x.shape[2:])], 1)


class Widening(nn.Module):
    """Two residual blocks of CIFAR's ResNets: the second has twice the channels, and a shortcut without weights."""

    def __init__(self, shortcut: Callable[[int, int], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.narrow, self.wide = (
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.shortcut, self.head = shortcut(width, 2 * width), nn.Linear(2 * width, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = (x + self.outer(self.inner(x).relu())).relu()
        y = self.wide(self.narrow(x).relu())
        y += self.shortcut(x)
        return self.head(y.relu().mean((2, 3)))


def _option_a(inputs: int, outputs: int) -> nn.Module:
    """As it is mostly written: the amounts are known to a closure only."""
    extra = outputs // 4
    return Apply(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra), "constant", 0))


def _constant_pad(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.ConstantPad3d((0, 0, 0, 0, 3, outputs - inputs - 3), 0.0))


def _mirrored(inputs: int, outputs: int) -> nn.Module:
    return Apply(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), mode="replicate"))


@pytest.mark.parametrize(
    ("shortcut", "free"),
    [
        # The stream of eight channels lies in the middle of sixteen; the others stay.
        (_option_a, {"stem": 8}),
        (lambda i, o: PadBy(o - i, 2), {"stem": 8, "wide": 4}),
        (lambda i, o: PadBy(o - i, 1), {"stem": 8, "wide": 8}),
        (_constant_pad, {"stem": 8, "wide": 8}),
        (lambda i, o: JoinZeros(o - i), {"stem": 8, "wide": 8}),
        # As many zeros as channels: both go together.
        (
            lambda i, o: Apply(lambda x: torch.cat([F.avg_pool2d(x, 2), F.avg_pool2d(x, 2).mul(0)], 1)),
            {"stem": 8},
        ),
        (_mirrored, {}),
    ],
)
def test_what_lies_opposite_padded_zeros_stays_or_shrinks_with_their_number(
    shortcut: Callable[[int, int], nn.Module], free: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model, image = Widening(shortcut).eval(), torch.randn(1, 3, 8, 8)
    groups = find_groups(model, image)
    found: dict[str, int] = {}
    for group in groups.free:
        first = group.of_role("producer")[0].module
        found[first] = found.get(first, 0) + group.n_channels
    assert found == {"inner": 8, "narrow": 16, **free}
    # Not as many of one side as of the other.
    masks = {
        g.name: torch.arange(g.n_channels) % (2 + number % 3) != 0 for number, g in enumerate(groups.free)
    }
    plan = sk.make_plan(groups, masks)
    assert sk.verify_cut(model, sk.apply_plan(model, plan), plan).max_rel < 1e-5


def test_channels_opposite_a_number_in_the_code_say_so() -> None:
    groups = find_groups(Widening(_option_a), torch.randn(1, 3, 8, 8))
    (stem,) = [g for g in groups if g.name == "stem"]
    assert {(m.tensor, m.dim): m.positions for m in stem.members}["wide.weight", 0] == tuple(range(4, 12))
    opposite = [g for g in groups if g.name.startswith("wide")]
    assert sorted(g.n_channels for g in opposite) == [4, 4]
    assert {g.frozen for g in opposite} == {"constants are padded opposite to it, and the code says how many"}
