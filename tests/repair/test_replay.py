"""Running the rest of a network gives what running all of it gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from models_by_hand import build
from plain import find_groups
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.repair.divergence import divergence
from sparsekit.repair.held_out import HeldOut, outputs_of
from sparsekit.repair.replay import Recording, Stations, batches_of
from sparsekit.structure.groups import ChannelGroups


class UNet(nn.Module):
    """Long skips, sizes by interpolation, and sums and concatenations in code."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)])
        self.bottom = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ModuleList([nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(16, 6, 3, padding=1)])
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first = F.relu_(self.down[0](x))
        second = F.relu(self.down[1](F.avg_pool2d(first, 2)))
        low = F.interpolate(self.bottom(F.avg_pool2d(second, 2)), scale_factor=2)
        middle = self.up[0](torch.cat([second, low], 1)).relu()
        top = self.up[1](torch.cat([first, F.interpolate(middle, scale_factor=2)], 1))
        return self.head(top * self.scale + 0.1), {"low": low.mean((2, 3))}


class ActsFirst(nn.Module):
    """A block that overwrites what it reads, which the skip around it reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x))


class OverwritesItsSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([ActsFirst() for _ in range(12)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) + x
        return self.head(x.mean((2, 3)))


def networks(name: str) -> tuple[nn.Module, tuple[Tensor, ...], ChannelGroups]:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "deit_tiny_patch16_224": {"depth": 3, "img_size": 32, "embed_dim": 48, "num_heads": 3}
    }
    own = {"UNet": UNet, "OverwritesItsSkip": OverwritesItsSkip}
    if name in own:
        model: nn.Module = own[name]()
    elif name in ("Siamese", "UsedTwice"):
        model, inputs = build(name)
        inputs = tuple(torch.randn(5, *x.shape[1:], dtype=torch.float64) for x in inputs)
        return model, inputs, find_groups(model, inputs)
    else:
        model = timm.create_model(name, num_classes=5, **options.get(name, {}))
    x = torch.randn(5, 3, 32, 32)
    model.eval()
    return model, (x,), find_groups(model, x)


NAMES = [
    "test_resnet",
    "mobilenetv3_small_050",
    "deit_tiny_patch16_224",
    "UNet",
    "OverwritesItsSkip",
    "Siamese",
    "UsedTwice",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_a_network_gives_what_all_of_it_gives(name: str) -> None:
    model, inputs, groups = networks(name)
    stations = Stations.of(model, groups, tuple(x[:1] for x in inputs))
    assert not any(a != b and a.startswith(f"{b}.") for a in stations.names for b in stations.names)
    recording = Recording(model, stations, inputs)
    wanted = outputs_of(model, inputs)
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args, key=key: calls.append(key))
        for key, module in model.named_modules()
        if not list(module.children()) and list(module.parameters())
    ]
    for first in range(len(stations.names) + 1):
        found = recording.outputs_from(model, first)
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs), first
    ran_inside = [c for c in calls if any(c.startswith(f"{name}.") for name in stations.names)]
    for hook in hooks:
        hook.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    if name in ("test_resnet", "mobilenetv3_small_050", "deit_tiny_patch16_224"):
        assert len(stations.names) > 5
        assert ran_inside


@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_compared_as_whole_runs_compare_it(name: str) -> None:
    model, inputs, groups = networks(name)
    dense = outputs_of(model, inputs)
    held_out = HeldOut(model, groups, inputs)
    tensors = dict(model.named_parameters())
    chosen = [key for key in tensors if key.endswith("weight") and tensors[key].dim() > 1]
    for key in [*chosen[:: max(len(chosen) // 6, 1)], *(k for k in tensors if "." not in k)]:
        before = tensors[key].detach().clone()
        with torch.no_grad():
            tensors[key].mul_(0.7)
        wanted = divergence(dense, outputs_of(model, inputs))
        found = held_out.of_change(model, [key])
        assert found.kl == pytest.approx(wanted.kl, rel=1e-4, abs=1e-9), key
        assert found.agreement == pytest.approx(wanted.agreement, nan_ok=True), key
        with torch.no_grad():
            tensors[key].copy_(before)
    unchanged = held_out.of(model)
    assert unchanged.kl == pytest.approx(0.0, abs=1e-9)


def test_a_tensor_outside_of_all_stations_makes_everything_run() -> None:
    model, inputs, groups = networks("UNet")
    stations = Stations.of(model, groups, inputs)
    last = stations.names[-1]
    assert stations.first_of([f"{last}.weight"]) == len(stations.names) - 1
    assert stations.first_of(["scale"]) == stations.first_of([f"{last}.weight", "scale"]) == 0
    assert stations.first_of([f"{name}.weight" for name in reversed(stations.names[2:])]) == 2


def test_images_beyond_the_recorded_ones_count_where_whole_models_are_compared() -> None:
    model, _, groups = networks("test_resnet")
    x = torch.randn(37, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    held_out = HeldOut(model, groups, (x,), recorded=16)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_submodule(held_out.stages[-1]).apply(
            lambda m: [p.mul_(0.5) for p in m.parameters(recurse=False)]
        )
    wanted = divergence(outputs_of(model, (x,)), outputs_of(changed, (x,)))
    found = held_out.of(changed)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-4)
    assert found.agreement == pytest.approx(wanted.agreement)
    names = [
        n for n, p in changed.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])
    ]
    recorded = divergence(outputs_of(model, (x[:16],)), outputs_of(changed, (x[:16],)))
    assert held_out.of_change(changed, names).kl == pytest.approx(recorded.kl, rel=1e-4)


def test_recordings_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, groups = networks("test_resnet")
    x = torch.randn(64, 3, 32, 32)
    one = Recording(model, Stations.of(model, groups, (x[:1],)), (x[:16],)).n_bytes
    monkeypatch.setattr("sparsekit.repair.held_out._MOST_BYTES", int(2.5 * one))
    assert len(HeldOut(model, groups, (x,))._recordings) == 2
    monkeypatch.setattr("sparsekit.repair.held_out._MOST_BYTES", 1)
    assert len(HeldOut(model, groups, (x,))._recordings) == 1


@pytest.mark.parametrize("n", [1, 16, 17, 33, 50])
def test_batches_hold_all_images_and_none_is_left_alone(n: int) -> None:
    """The variance of a single number says nothing."""
    x = torch.arange(float(n))
    parts = [batch for (batch,) in batches_of((x,), 16)]
    assert torch.equal(torch.cat(parts), x)
    assert all(len(part) <= 16 and (len(part) > 1 or n == 1) for part in parts)
