"""Layers that lost inputs, fitted anew to what the pruned network gives them."""

from __future__ import annotations

import copy

import pytest
import torch
from plain import find_groups
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.repair import refit as refit_file
from sparsekit.repair.held_out import HeldOut
from sparsekit.repair.refit import refit


class Residual(nn.Module):
    """Two convolutions and a norm beside a plain shortcut, without an activation after the addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(width, 24, 3, padding=1), nn.Conv2d(24, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.out(self.into(x).relu()))


class Network(nn.Module):
    """A stem, three residual blocks, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(16) for _ in range(3)))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.stem(x)).relu().mean((2, 3)))


def images(n: int) -> Tensor:
    coarse = torch.randn(n, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (12, 12), mode="bilinear", align_corners=True)


def prepared() -> tuple[nn.Module, nn.Module, sk.PrunePlan, sk.InputStatistics, HeldOut]:
    """A network, half of whose block's inner channels are cut and repaired in closed form."""
    torch.manual_seed(0)
    model = Network().eval()
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, Residual)
            block.norm.weight.uniform_(0.5, 2.0)
            block.norm.running_var.uniform_(0.02, 0.1)
    groups = find_groups(model, images(1))
    inner = [group for group in groups.free if group.name.endswith("into")]
    assert len(inner) == 3
    plan = sk.make_plan(groups, {group.name: torch.arange(24) % 2 == 0 for group in inner})
    statistics = sk.input_statistics(model, groups, images(96).split(16), most_positions=200)
    repaired = sk.repair_weights(model, plan, statistics)
    return model, sk.apply_plan(repaired, plan), plan, statistics, HeldOut(model, groups, (images(96),))


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean())


def test_the_outputs_come_nearer_and_both_models_stay_as_they_are() -> None:
    model, pruned, plan, statistics, held_out = prepared()
    before = [copy.deepcopy(one.state_dict()) for one in (model, pruned)]
    found = refit(model, pruned, plan, statistics.readers, images(96), held_out.stations)
    assert error(model, found, images(96)) < 0.95 * error(model, pruned, images(96))
    for one, state in zip((model, pruned), before, strict=True):
        assert all(torch.equal(values, state[name]) for name, values in one.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())
        assert not any("forward" in vars(module) for module in one.modules())


def test_only_layers_that_lost_inputs_change() -> None:
    model, pruned, plan, statistics, held_out = prepared()
    found = refit(model, pruned, plan, statistics.readers, images(96), held_out.stations)
    old = pruned.state_dict()
    changed = {name for name, values in found.state_dict().items() if not torch.equal(values, old[name])}
    assert changed == {f"blocks.{i}.out.{name}" for i in range(3) for name in ("weight", "bias")}


def test_a_cut_that_lost_nothing_is_left_as_it_is() -> None:
    """Copies of channels are predicted exactly, so there is nothing to make up for."""
    torch.manual_seed(0)
    model = Network().eval()
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, Residual)
            block.into.weight[12:], block.into.bias[12:] = block.into.weight[:12], block.into.bias[:12]
    groups = find_groups(model, images(1))
    inner = {group.name: torch.arange(24) < 12 for group in groups.free if group.name.endswith("into")}
    plan = sk.make_plan(groups, inner)
    statistics = sk.input_statistics(model, groups, images(96).split(16), most_positions=200)
    pruned = sk.apply_plan(sk.repair_weights(model, plan, statistics), plan)
    held_out = HeldOut(model, groups, (images(96),))
    found = refit(model, pruned, plan, statistics.readers, images(96), held_out.stations)
    scale = float(model(images(96)).detach().square().mean())
    assert error(model, found, images(96)) < 1e-4 * scale


@pytest.mark.parametrize("room", [16 * 144 * 16 * 4, 2**30])
def test_with_memory_for_few_images_or_for_all_the_outputs_come_nearer(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one batch fewer images are used where maps are large."""
    monkeypatch.setattr(refit_file, "_MOST_BYTES", room)
    model, pruned, plan, statistics, held_out = prepared()
    found = refit(model, pruned, plan, statistics.readers, images(96), held_out.stations)
    assert error(model, found, images(96)) < error(model, pruned, images(96))


def test_three_dimensions_are_refitted_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv3d(3, 16, 3), nn.ReLU(), nn.Conv3d(16, 12, 1), nn.ReLU(), nn.Conv3d(12, 16, 1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5)),
    ).eval()
    x = torch.randn(60, 3, 6, 7, 9)
    used, apart = x[:44], x[44:]
    groups = find_groups(model, x[:1])
    plan = sk.make_plan(groups, {g.name: torch.arange(g.n_channels) % 3 > 0 for g in groups.free})
    known = sk.input_statistics(model, groups, [used])
    pruned = sk.apply_plan(sk.repair_weights(model, plan, known), plan)
    held_out = HeldOut(model, groups, (apart,))
    found = refit(model, pruned, plan, known.readers, used, held_out.stations)
    assert held_out.of(found).kl < 1.5 * held_out.of(pruned).kl
    assert any(not torch.equal(a, b) for a, b in zip(found.parameters(), pruned.parameters(), strict=True))
