"""Learned importance against finite differences of a loss."""

from __future__ import annotations

import pytest
import torch
from plain import find_groups
from torch import nn

from sparsekit.sparsify.learned_importance import note_effects_
from sparsekit.sparsify.penalised_weights import PenalisedWeights

EXAMPLE = torch.zeros(1, 3, 8, 8)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


def test_a_sensitivity_is_the_squared_slope_of_the_loss_along_a_channel() -> None:
    """d/da of the loss with a channel's scale and shift multiplied by a, at a = 1, by central differences."""
    model = _network().double()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    images, labels = torch.randn(16, 3, 8, 8).double(), torch.randint(4, (16,))
    groups = find_groups(model, EXAMPLE.double())
    tensors = dict(model.named_parameters())

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model.train()(images), labels)

    loss().backward()
    running = torch.zeros(6, dtype=torch.float64)
    shrunk = PenalisedWeights(model, groups, "group_lasso").shrunk
    for _ in range(2000):
        note_effects_(running, tensors, shrunk)
    with torch.no_grad():
        for channel in range(6):
            values = []
            for factor in (1 + 1e-5, 1 - 1e-5):
                kept = model[1].weight.clone(), model[1].bias.clone()
                model[1].weight[channel] *= factor
                model[1].bias[channel] *= factor
                values.append(float(loss()))
                model[1].weight.copy_(kept[0])
                model[1].bias.copy_(kept[1])
            slope = (values[0] - values[1]) / 2e-5
            assert float(running[channel]) == pytest.approx(slope**2, rel=1e-4, abs=1e-12)


def test_weights_without_gradients_add_nothing() -> None:
    model = _network()
    tensors = dict(model.named_parameters())
    running = torch.ones(6)
    shrunk = PenalisedWeights(model, find_groups(model, EXAMPLE), "group_lasso").shrunk
    note_effects_(running, tensors, shrunk)
    assert torch.allclose(running, torch.full((6,), 0.98))


def test_gradients_that_overflowed_are_forgotten() -> None:
    model = _network()
    tensors = dict(model.named_parameters())
    values = torch.ones(6)
    shrunk = PenalisedWeights(model, find_groups(model, EXAMPLE), "group_lasso").shrunk
    scale = tensors["1.weight"]
    scale.grad = torch.tensor([1.0, 2.0, float("inf"), float("nan"), 0.0, 1e30])
    note_effects_(values, tensors, shrunk)
    assert values[0] < values[1]
    assert values[2] == values[3] == values[4] == pytest.approx(0.98)
