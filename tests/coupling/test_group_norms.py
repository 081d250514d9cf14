"""Group norms lose whole norm groups; instance norms lose channels one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_by_hand import random_masks, zero_dropped_
from timm.layers import GroupNormAct
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.coupling.find_groups import find_groups
from sparsekit.selection.importance import filter_norms
from sparsekit.structure.plan import make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.verify import compare_outputs, verify_cut


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class Block(nn.Module):
    """A residual block of a diffusion network: two group norms, and an embedding of the time added between."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), conv(inputs, outputs)
        self.time = nn.Linear(6, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), conv(outputs, outputs)
        self.skip = conv(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inside = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(inside)))


class DiffusionUNet(nn.Module):
    """16 and 8 channels are joined and normalised in 4 groups of 6: borders do not line up with those of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8), nn.Conv2d(8, 8, 3, 2, 1)
        self.inner, self.outer = Block(8, 16), Block(24, 8)
        self.norm, self.head = nn.GroupNorm(4, 8), conv(8, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        skip = self.stem(x)
        up = F.interpolate(self.inner(self.down(skip), time), scale_factor=2.0)
        return self.head(F.silu(self.norm(self.outer(torch.cat([up, skip], 1), time))))


class SharedHead(nn.Module):
    """A detector's tower, shared by the levels of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8), nn.Conv2d(8, 8, 3, 2, 1)
        self.tower = nn.Sequential(
            conv(8, 12), nn.GroupNorm(6, 12), nn.ReLU(), conv(12, 8), GroupNormAct(8, 4)
        )
        self.classes, self.boxes = conv(8, 5), conv(8, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        level = self.stem(x)
        towers = [self.tower(one) for one in (level, self.down(level))]
        return [head(tower) for tower in towers for head in (self.classes, self.boxes)]


class ByHand(nn.Module):
    """Group norms without a module of their own; the last is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last, self.head = conv(3, 12), conv(12, 8), conv(8, 12), conv(12, 2)
        self.groups, self.channels, self.parts = 3, 8, 4
        self.weight, self.bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.group_norm(self.stem(x), self.groups, self.weight, self.bias))
        x = F.relu(F.group_norm(self.middle(x), self.channels // 2))
        x = self.last(x)
        rows = x.view(len(x), self.parts, -1)
        rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-5).sqrt()
        return self.head(F.relu(rows.view(x.shape)))


class InstanceNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last, self.head = conv(3, 6), conv(6, 8), conv(8, 6), conv(6, 2)
        self.plain, self.affine = nn.InstanceNorm2d(6), nn.InstanceNorm2d(8, affine=True)
        self.tracking = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.affine(self.middle(F.relu(self.plain(self.stem(x))))))
        return self.head(F.relu(self.tracking(self.last(x))))


@pytest.mark.parametrize(
    ("make", "shapes", "free"),
    [
        # Two norm groups of 6 lie within the first 16 of the joined channels; the third has some of both parts.
        (
            DiffusionUNet,
            ((2, 3, 8, 8), (2, 6)),
            {"down": 4, "inner.conv1": 4, "inner.skip": 2, "outer.conv1": 4, "outer.skip": 4},
        ),
        (SharedHead, ((2, 3, 8, 8),), {"stem": 8, "tower.0": 6, "tower.3": 4}),
        (ByHand, ((2, 3, 8, 8),), {"stem": 3, "middle": 4, "last": 4}),
        (InstanceNorms, ((2, 3, 8, 8),), {"stem": 6, "middle": 8, "last": 6}),
    ],
)
def test_whole_norm_groups_go_and_zero_ones_without_changing_anything(
    make: Callable[[], nn.Module], shapes: tuple[tuple[int, ...], ...], free: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for name, parameter in model.named_parameters():
        if "norm" in name or parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    groups = find_groups(model, inputs, round_to=1, min_channels=1)
    assert {g.name: g.n_channels for g in groups.free} == free
    plan = make_plan(groups, random_masks(groups, 0.6))
    pruned = apply_plan(model, plan)
    verify_cut(model, pruned, plan, tolerance=1e-9)
    sk.save(pruned, tmp_path, factory=make)
    assert compare_outputs(pruned, sk.load(tmp_path, factory=make), plan.inputs).max_rel < 1e-12
    again = find_groups(pruned, inputs, round_to=1, min_channels=1)
    assert {g.name for g in again.free} == {one.name for one in plan.groups if len(one.kept) > 1}
    zero_dropped_(model, plan)
    assert compare_outputs(model, apply_plan(model, plan), plan.inputs).max_rel < 1e-9


def test_a_number_of_norm_groups_in_the_code_keeps_the_width() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = conv(3, 8), conv(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.group_norm(self.stem(x), 4))

    assert "no attribute" in find_groups(Written(), torch.randn(1, 3, 8, 8))["stem"].frozen
    whole = nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 2))
    assert "mixes channels" in find_groups(whole, torch.randn(1, 3, 8, 8))["0"].frozen


def test_what_weighs_in_front_of_a_group_norm_is_the_filter_within_its_norm_group() -> None:
    model = nn.Sequential(conv(3, 6), nn.GroupNorm(3, 6), nn.ReLU(), conv(6, 2))
    groups = find_groups(model, torch.randn(1, 3, 8, 8), round_to=1, min_channels=1)
    with torch.no_grad():
        model[0].weight[4:] *= 100  # the norm takes the size of a whole norm group away
        model[1].weight.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0, 3.0, 3.0]))
    norms = filter_norms(model, groups)["0"]
    torch.testing.assert_close(norms, torch.tensor([2.0, 0.0, 18.0], dtype=torch.float64).sqrt())
    assert {m.tensor for m in groups["0"].penalised} == {"1.weight", "1.bias"}
