"""Channels that come back from zero: only those the loss pulls at harder than the penalty holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from plain import find_groups
from plain import sparsifier as sparsifier_of
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.errors import InputError
from sparsekit.options import Penalty
from sparsekit.sparsify.channel_vectors import OwnedWeights
from sparsekit.sparsify.revival import Revival
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member
from sparsekit.structure.inputs import InputSpec
from sparsekit.training.checkpoint import load_state, save_state

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.01),
}
WIDTH = 8
NO_PARTS = PhaseShares(0.0, 0.0, 0.0)


class Filters(nn.Module):
    """Channels of eight bare weights, so that a test decides what the gradient is."""

    def __init__(self, n: int, size: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((n, WIDTH), size))
        member = Member("x", 0, tuple(range(n)), 1, "producer", penalised=True)
        self.groups = ChannelGroups((ChannelGroup("x", n, (member,)),), inputs=InputSpec())


def _train(
    model: Filters, optimizer: Optimizer, sparsifier: sk.Sparsifier, minima: Tensor, steps: range
) -> Tensor:
    """Minimise 1/2 |x - minima|^2 under noise; returns the weights' mean over the last half of the steps."""
    mean = torch.zeros_like(model.x)
    for step in steps:
        noise = torch.randn(model.x.shape, generator=torch.Generator().manual_seed(step))
        model.x.grad = model.x.detach() - minima + 0.5 * noise
        optimizer.step()
        sparsifier.step(optimizer)
        mean += model.x.detach() * (step >= len(steps) / 2) / (len(steps) / 2)
    return mean


@pytest.mark.parametrize("revive", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_channels_come_back_iff_the_loss_pulls_harder_than_the_penalty(kind: str, revive: bool) -> None:
    """A third of the channels has its minimum so far from zero that the penalty moves, but cannot hold it."""
    model = Filters(60, 1e-6)
    optimizer = OPTIMIZERS[kind](model.parameters())
    sparsifier = sparsifier_of(model, model.groups, strength=0.2, min_channels=0, revive=revive)
    model.x.grad = torch.zeros_like(model.x)
    optimizer.step()
    sparsifier.step(optimizer)
    assert not model.x.any()
    each = torch.tensor([0.0, 0.1, 0.4]).repeat_interleave(20)  # each weight's minimum
    mean = _train(model, optimizer, sparsifier, each[:, None].expand(60, WIDTH), range(2000))
    alive = (model.x != 0).any(1)
    assert torch.equal(alive, (each > 0.2) & torch.tensor(revive))
    if revive:
        # SGD: gradient = -0.2; AdamW: -0.2 x rms, which is (0.25 + gradient^2)^(1/2).
        bias = 0.2 if kind == "momentum" else (0.2**2 * 0.25 / (1 - 0.2**2)) ** 0.5
        assert mean[alive].mean().item() == pytest.approx(0.4 - bias, abs=0.03)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("penalty", get_args(Penalty))
def test_the_pull_is_the_largest_threshold_that_does_not_hold_a_steady_gradient(
    penalty: Penalty, relative: bool
) -> None:
    model = Filters(3, 0.0)
    shrunk = OwnedWeights(dict(model.named_parameters()), model.groups.groups, lambda group: group.members)
    revival = Revival(shrunk, dict(model.named_parameters()), penalty)
    gradient = torch.tensor([[3.0], [-0.5], [0.0]]).expand(3, WIDTH)
    model.x.grad = gradient.clone()
    for _ in range(99):
        revival.observe()
    assert not revival.of_channels(relative=relative).any()  # too early to say
    revival.observe()
    expected = torch.tensor([1.0, 1.0, 0.0]) if relative else torch.tensor([3.0, 0.5, 0.0])
    if penalty not in ("l1", "scale_l1"):
        expected = expected * WIDTH**0.5
    assert torch.allclose(revival.of_channels(relative=relative), expected, rtol=1e-3)
    model.x.grad[0] = torch.inf  # a scaler's first steps
    revival.observe()
    model.x.grad = None
    revival.observe()
    assert bool(revival.of_channels(relative=relative).isfinite().all())


def test_a_mean_within_its_error_does_not_pull() -> None:
    """Of 20,000 channels that feel noise alone; a mean of 0.3 in noise of 1 is beyond it, 0.1 is not."""
    n = 20_000
    model = Filters(n, 0.0)
    shrunk = OwnedWeights(dict(model.named_parameters()), model.groups.groups, lambda group: group.members)
    revival = Revival(shrunk, dict(model.named_parameters()), "group_lasso")
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(n, 1)
    means[0] = 0.5
    for _ in range(400):
        model.x.grad = means + torch.randn(n, WIDTH, generator=generator)
        revival.observe()
    pulls = revival.of_channels(relative=False)
    # Without the allowance a mean over a hundred steps would be 0.07 in each of the eight.
    assert pulls[1:].quantile(0.99).item() < 0.1 * WIDTH**0.5
    assert pulls[0].item() == pytest.approx(0.5 * WIDTH**0.5 * (1 - 3 * 0.071 / 0.5), rel=0.3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_momenta_of_channels_that_may_come_back_are_kept_while_the_penalty_acts(kind: str) -> None:
    model = Filters(2, 1e-6)
    optimizer = OPTIMIZERS[kind](model.parameters())
    sparsifier = sparsifier_of(
        model,
        model.groups,
        strength=0.2,
        min_channels=0,
        revive=True,
        total_steps=20,
        shares=PhaseShares(0.0, 0.0, 0.5),
    )
    for step in range(20):
        model.x.grad = torch.full_like(model.x, 0.01 * (-1) ** step if step else 0.0)
        optimizer.step()
        sparsifier.step(optimizer)
        assert not model.x.any()
        buffers = [b for b in optimizer.state[model.x].values() if b.shape == model.x.shape]
        assert all(bool(buffer.any()) == (0 < step < 10) for buffer in buffers)


def test_units_come_back_when_the_data_ask_for_others() -> None:
    """A network learns to compute one function and then another, which needs other hidden units."""

    def loss_after_the_change(revive: bool) -> tuple[float, int, int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        sparsifier = sparsifier_of(
            model, find_groups(model, torch.zeros(1, 8)), strength=0.02, min_channels=0, revive=revive
        )
        alive = []
        for step in range(1600):
            x = torch.randn(64, 8)
            y = x[:, :1] if step < 800 else x[:, 1:2].abs() + x[:, 2:3] * x[:, 3:4]
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            sparsifier.step(optimizer)
            if step in (799, 1599):
                alive.append(int((model[0].weight != 0).any(1).sum()))
        return loss.item(), alive[0], alive[1]

    held, revived = loss_after_the_change(False), loss_after_the_change(True)
    assert held[2] <= held[1]
    assert revived[2] > revived[1]
    assert revived[0] < 0.7 * held[0]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_interrupted_run_revives_the_same_channels(kind: str, tmp_path: Path) -> None:
    minima = torch.tensor([0.0, 0.1, 0.4]).repeat_interleave(4)[:, None].expand(12, WIDTH)

    def start() -> tuple[Filters, Optimizer, sk.Sparsifier]:
        model = Filters(12, 1e-6)
        optimizer = OPTIMIZERS[kind](model.parameters())
        return model, optimizer, sparsifier_of(model, model.groups, strength=0.2, revive=True, min_channels=0)

    whole, first, again = start(), start(), start()
    _train(*whole, minima, range(400))
    _train(*first, minima, range(90))
    save_state(
        tmp_path / "state.safetensors",
        {"model": first[0].state_dict(), "optimizer": first[1].state_dict(), "hook": first[2].state_dict()},
    )
    state = load_state(tmp_path / "state.safetensors")
    for part, stored in zip(again, state.values(), strict=True):
        part.load_state_dict(stored)
    _train(*again, minima, range(90, 400))
    assert torch.equal(whole[0].x, again[0].x)
    assert bool(whole[0].x.any())


def test_a_state_without_the_pull_is_refused() -> None:
    model = Filters(3, 1.0)
    plain = sparsifier_of(model, model.groups, strength=0.2)
    reviving = sparsifier_of(copy.deepcopy(model), model.groups, strength=0.2, revive=True)
    with pytest.raises(InputError, match="revives channels"):
        reviving.load_state_dict(plain.state_dict())
    with pytest.raises(InputError, match="revives channels"):
        plain.load_state_dict(reviving.state_dict())
