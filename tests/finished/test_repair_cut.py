"""Making up for a cut that was decided elsewhere: nearer to the model before it, which stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.errors import DataError
from sparsekit.finished.repair_cut import cut_and_repair


def network() -> tuple[nn.Module, sk.ChannelGroups, sk.PrunePlan]:
    """Two convolutions with norms in training mode, and a plan that drops every third channel, whatever it is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)),
    )
    model[1].eval()
    groups = sk.find_groups(model, torch.zeros(1, 3, 12, 12), round_to=1, min_channels=1)
    plan = sk.make_plan(groups, {group.name: torch.arange(12) % 3 > 0 for group in groups.free})
    return model, groups, plan


def test_it_comes_nearer_with_each_step_that_is_taken_and_the_model_stays_as_it_was() -> None:
    model, groups, plan = network()
    before = copy.deepcopy(model)
    found = cut_and_repair(model, groups, plan, torch.randn(48, 3, 12, 12), seconds=0.2)
    names = ["cut", "closed form", "refit layer by layer", "learning from the sparse model"]
    assert [step.name for step in found.steps] == names
    assert found.divergence.kl == min(step.kl for step in found.steps) < 0.5 * found.steps[0].kl
    assert found.proof.max_rel < 1e-4
    assert not found.interrupted
    shapes = {name: values.shape for name, values in sk.apply_plan(model, plan).state_dict().items()}
    assert {name: values.shape for name, values in found.model.state_dict().items()} == shapes
    assert [m.training for m in found.model] == [m.training for m in model] == [m.training for m in before]
    assert all(torch.equal(values, before.state_dict()[name]) for name, values in model.state_dict().items())


def test_without_seconds_it_does_not_learn() -> None:
    model, groups, plan = network()
    found = cut_and_repair(model, groups, plan, torch.randn(48, 3, 12, 12), seconds=0)
    assert [step.name for step in found.steps] == ["cut", "closed form", "refit layer by layer"]


def test_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="at least 32"):
        cut_and_repair(*network(), torch.randn(8, 3, 12, 12), seconds=0)
