"""The hook in a training loop: its thresholds, its fixed points, its zeros, its target, and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from plain import find_groups
from plain import sparsifier as sparsifier_of
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekit as sk
from sparsekit.errors import InputError, TrainingError
from sparsekit.evaluation import evaluating
from sparsekit.options import Penalty
from sparsekit.selection.carriers import keep_carriers
from sparsekit.selection.costs import kept_share
from sparsekit.selection.importance import filter_norms, zero_channels
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.structure.groups import ChannelGroup, ChannelGroups, Member
from sparsekit.structure.inputs import InputSpec
from sparsekit.training.checkpoint import load_state, save_state

Optimizer = torch.optim.Optimizer
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
NO_PARTS = PhaseShares(0.0, 0.0, 0.0)


class Points(nn.Module):
    """Bare parameters, so that a test decides what the gradient is."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


def _groups(*named: tuple[str, ...], n: int) -> ChannelGroups:
    """One group a tuple: its tensors, each with the channels along its first dimension."""
    return ChannelGroups(
        tuple(
            ChannelGroup(
                names[0],
                n,
                tuple(Member(name, 0, tuple(range(n)), 1, "producer", penalised=True) for name in names),
            )
            for names in named
        ),
        inputs=InputSpec(),
    )


def _set_gradients(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def _convnet(batchnorm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    norms: list[nn.Module] = [nn.BatchNorm2d(n) if batchnorm else nn.Identity() for n in (12, 16)]
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        norms[0],
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, stride=2),
        norms[1],
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


EXAMPLE = torch.zeros(1, 3, 8, 8)
_generator = torch.Generator().manual_seed(0)
LABELS = torch.randint(4, (256,), generator=_generator)
PATTERNS = torch.randn(4, 3, 8, 8, generator=_generator)
IMAGES = PATTERNS[LABELS] + 0.5 * torch.randn(256, 3, 8, 8, generator=_generator)


def _train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: range,
    sparsifier: sk.Sparsifier | None = None,
    after: Callable[[], None] = lambda: None,
) -> None:
    model.train()
    for step in steps:
        batch = slice(step * 32 % 256, step * 32 % 256 + 32)
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step(optimizer)
        after()


OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], float]] = {
    "sgd": (lambda p: SGD(p, lr=0.1), 0.1),
    "momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9), 1.0),
    "nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True), 0.5),
    "dampened": (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5), 0.5),
    "dampening without momentum": (lambda p: SGD(p, lr=0.1, dampening=0.5), 0.1),
    "adamw": (lambda p: AdamW(p, lr=0.1, weight_decay=0.1), 0.1),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), 0.1),
}


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_step_shrinks_by_the_documented_threshold(kind: str, penalty: str) -> None:
    """Against the same optimizer on a copy that is shrunk by hand; p_g = 3 weights a channel."""
    build, rate = OPTIMIZERS[kind]
    generator = torch.Generator().manual_seed(1)
    start = {
        "weight": torch.randn(5, 2, generator=generator) + 9,
        "bias": torch.randn(5, generator=generator) - 9,
    }
    ours, by_hand = Points(**start), Points(**start)
    optimizer, reference = build(ours.parameters()), build(by_hand.parameters())
    groups = _groups(("weight", "bias"), n=5)
    shares = PhaseShares(0.25, 0.5, 0.25)
    sparsifier = sparsifier_of(ours, groups, penalty=penalty, strength=0.2, total_steps=8, shares=shares)
    for step, factor in enumerate((0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 0.0, 0.0)):
        for model, opt in ((ours, optimizer), (by_hand, reference)):
            _set_gradients(model, torch.Generator().manual_seed(step))
            opt.step()
        sparsifier.step(optimizer)
        assert sparsifier.strength == pytest.approx(0.2 * factor)
        t = rate * 0.2 * factor
        with torch.no_grad():
            weight, bias = by_hand.weight, by_hand.bias
            norms = (weight.square().sum(1) + bias.square()).sqrt()
            if penalty == "group_lasso":
                keep = 1 - t * 3**0.5 / norms
                weight.mul_(keep[:, None])
                bias.mul_(keep)
            else:
                for parameter in (weight, bias):
                    parameter.copy_(parameter.sign() * (parameter.abs() - t))
        assert torch.allclose(ours.weight, weight, rtol=1e-5)
        assert torch.allclose(ours.bias, bias, rtol=1e-5)


def test_each_group_is_shrunk_at_the_learning_rate_of_its_own_weights() -> None:
    model = Points(a=torch.full((2,), 5.0), b=torch.full((2,), 5.0), c=torch.full((2,), 5.0))
    optimizer = SGD([{"params": [model.a], "lr": 0.1}, {"params": [model.b, model.c], "lr": 0.3}], lr=1.0)
    sparsifier = sparsifier_of(model, _groups(("a",), ("b",), n=2), strength=2.0)
    sparsifier.step(optimizer)
    assert torch.allclose(model.a, torch.tensor(5 - 0.2))
    assert torch.allclose(model.b, torch.tensor(5 - 0.6))
    assert torch.equal(model.c, torch.full((2,), 5.0))
    optimizer.param_groups[0]["lr"] = 0.5  # as a scheduler does
    sparsifier.step(optimizer)
    assert torch.allclose(model.a, torch.tensor(5 - 0.2 - 1.0))


@pytest.mark.parametrize("kind", ["sgd", "momentum", "nesterov", "dampened"])
def test_sgd_converges_to_the_minimum_of_loss_plus_penalty(kind: str) -> None:
    """1/2 (x - 1)^2 + 0.3 |x| has its minimum at 0.7, and with 1.2 |x| at 0."""
    model = Points(x=torch.full((1,), 2.0, dtype=torch.float64), y=torch.full((1,), 2.0, dtype=torch.float64))
    optimizer = OPTIMIZERS[kind][0](model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    near = sparsifier_of(model, _groups(("x",), n=1), strength=0.3)
    far = sparsifier_of(model, _groups(("y",), n=1), strength=1.2, min_channels=0)
    for _ in range(1500):
        model.x.grad, model.y.grad = model.x.detach() - 1, model.y.detach() - 1
        optimizer.step()
        near.step(optimizer)
        far.step(optimizer)
    assert model.x.item() == pytest.approx(0.7, abs=5e-3)
    assert model.y.item() == 0.0


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
@pytest.mark.parametrize("kept", [1, 2])
def test_no_group_dies_out_however_strong_the_penalty(penalty: str, kept: int) -> None:
    model = Points(x=torch.tensor([[1.0, -2.0], [8.0, 9.0], [-7.0, 8.0], [0.5, 0.5]]))
    sparsifier = sparsifier_of(model, _groups(("x",), n=4), penalty=penalty, strength=1e3, min_channels=kept)
    for _ in range(500):
        sparsifier.step(SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"after 500 steps the strength of 1e\+03 has taken every channel"):
        sparsifier.progress()
    alive = model.x.detach().abs().sum(1) > 0
    assert alive.sum() == kept
    assert alive[1]  # the furthest from zero


def test_adamw_balances_the_penalty_against_gradients_in_units_of_their_size() -> None:
    """Mean gradient = -strength x rms(gradient): with noise 2.0, 1/2 (x - 1)^2 settles where 1 - x = 0.2 rms."""
    n = 512
    model = Points(x=torch.ones(n))
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    sparsifier = sparsifier_of(model, _groups(("x",), n=n), strength=0.2)
    generator = torch.Generator().manual_seed(0)
    mean = 0.0
    for step in range(3000):
        model.x.grad = model.x.detach() - 1 + 2 * torch.randn(n, generator=generator)
        optimizer.step()
        sparsifier.step(optimizer)
        if step >= 1500:
            mean += float(model.x.detach().mean()) / 1500
    # The mean is shifted up a little by channels that visit the other side of zero less often.
    assert mean == pytest.approx(1 - 0.2 * (4 + 0.16) ** 0.5, abs=0.05)


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_strength_zero_is_plain_training_to_the_bit(kind: str, penalty: str) -> None:
    plain, model = _convnet(), _convnet()
    model[4].weight.data[:3] = plain[4].weight.data[:3] = 0  # zero scales are nobody's to hold
    build = OPTIMIZERS[kind][0]
    _train(plain, build(plain.parameters()), range(6))
    sparsifier = sparsifier_of(model, find_groups(model, EXAMPLE), penalty=penalty, strength=0.0)
    _train(model, build(model.parameters()), range(6), sparsifier)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert sparsifier.progress() == {"zero_share": 0.0, "strength": 0.0}


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_zeros_are_exact_and_neither_momentum_nor_gradient_revives_them(kind: str, penalty: str) -> None:
    model = Points(
        x=torch.tensor([[0.05, -0.02], [8.0, 9.0], [-7.0, 8.0]]), y=torch.tensor([0.01, 6.0, -9.0])
    )
    optimizer = OPTIMIZERS[kind][0](model.parameters())
    shares = PhaseShares(0.0, 0.0, 0.5)
    sparsifier = sparsifier_of(
        model, _groups(("x", "y"), n=3), penalty=penalty, strength=1.0, total_steps=8, shares=shares
    )
    pulls = [0.0, 0.3] + [100.0] * 14  # from the third step on a gradient that would move anything
    for step, pull in enumerate(pulls):
        model.x.grad, model.y.grad = torch.full((3, 2), pull), torch.full((3,), -pull)
        optimizer.step()
        sparsifier.step(optimizer)
        if step == 1:
            assert sparsifier.progress()["zero_share"] == pytest.approx(1 / 3)
        if step >= 1:
            assert torch.equal(model.x[0], torch.zeros(2))
            assert model.y[0].item() == 0.0
            for parameter in (model.x, model.y):
                buffers = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
                assert len(buffers) == (1 if kind == "momentum" else 2)
                assert all(bool((buffer[0] == 0).all()) for buffer in buffers)
                assert all(bool((buffer[1:] != 0).all()) for buffer in buffers)
    assert bool((model.x[1:] != 0).all())


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_scales_that_start_at_zero_are_not_held_before_a_penalty_acted(strength: float) -> None:
    """As timm's zero_init_last leaves them, in a step at learning rate 0, as a warm-up of the rate begins."""
    model = Points(x=torch.zeros(4))
    optimizer = SGD(model.parameters(), lr=0.0)
    sparsifier = sparsifier_of(model, _groups(("x",), n=4), strength=strength)
    for rate in (0.0, 0.5):
        optimizer.param_groups[0]["lr"] = rate
        model.x.grad = torch.full((4,), -1.0)
        optimizer.step()
        sparsifier.step(optimizer)
        assert torch.allclose(model.x, torch.tensor(rate * (1 - strength)))
    assert sparsifier.progress()["zero_share"] == 0.0


def test_scales_that_start_at_zero_are_not_held_in_the_warmup_of_the_penalty() -> None:
    model = Points(x=torch.zeros(4))
    optimizer = SGD(model.parameters(), lr=1.0)
    shares = PhaseShares(0.5, 0.0, 0.0)
    sparsifier = sparsifier_of(model, _groups(("x",), n=4), strength=0.1, total_steps=4, shares=shares)
    for step in range(4):
        model.x.grad = torch.full((4,), -float(step))
        optimizer.step()
        sparsifier.step(optimizer)
        assert bool((model.x != 0).all()) == (step > 0)
    assert torch.allclose(model.x, torch.tensor(1.0 + 2.0 + 3.0 - 2 * 0.1))


def _largest_step(groups: ChannelGroups, masks: dict[str, Tensor], round_to: int) -> float:
    """The largest share of MACs that `round_to` more channels in one group bring back."""
    share, steps = kept_share(groups, masks).macs, []
    for name, mask in masks.items():
        grown = mask.clone()
        grown[(~mask).nonzero().flatten()[:round_to]] = True
        steps.append(kept_share(groups, {**masks, name: grown}).macs - share)
    return max(steps)


@pytest.mark.parametrize(
    ("kind", "penalty", "importance", "round_to", "target", "batchnorm"),
    [
        ("momentum", "group_lasso", "magnitude", 1, 0.4, True),
        ("momentum", "group_lasso", "taylor", 4, 0.5, True),
        ("adamw", "group_lasso", "taylor", 4, 0.5, True),
        ("adamw", "l1", "magnitude", 1, 0.5, True),
        ("momentum", "l1", "taylor", 1, 0.6, False),
        ("momentum", "group_lasso", "magnitude", 2, 0.6, False),
    ],
)
def test_strength_auto_meets_the_target_within_its_phase_and_the_cut_is_lossless(
    kind: str, penalty: str, importance: str, round_to: int, target: float, batchnorm: bool
) -> None:
    model = _convnet(batchnorm)
    groups = find_groups(model, EXAMPLE)
    optimizer = OPTIMIZERS[kind][0](model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.02 if kind == "momentum" else 0.01
    steps, shares = 200, PhaseShares(0.1, 0.2, 0.2)
    sparsifier = sparsifier_of(
        model,
        groups,
        penalty=penalty,
        strength="auto",
        total_steps=steps,
        shares=shares,
        target={"macs": target},
        round_to=round_to,
        importance=importance,
    )
    _train(model, optimizer, range(20), sparsifier)
    assert sparsifier.progress() == {"zero_share": 0.0, "strength": 0.0}
    _train(model, optimizer, range(20, 160), sparsifier)
    at_debias = zero_channels(model, groups)
    _train(model, optimizer, range(160, steps), sparsifier)
    assert all(torch.equal(dead, at_debias[name]) for name, dead in zero_channels(model, groups).items())

    masks = sk.keep_masks(model, groups.with_rounding(round_to, 1), method="zeros")
    left = kept_share(groups, masks).macs
    assert target - _largest_step(groups, masks, round_to) <= left <= target
    plan = sk.make_plan(groups, masks)
    pruned = sk.apply_plan(model, plan)
    with evaluating(model), evaluating(pruned):
        logits, cut = model(IMAGES), pruned(IMAGES)
    assert logits.abs().max() > 1
    assert (logits - cut).abs().max() < 1e-5 * logits.abs().max()


# One name of each of timm's own optimizer classes that needs neither a package more nor second derivatives.
TIMM_OPTIMIZERS = (
    *(
        "adabelief",
        "adadelta",
        "adafactor",
        "adafactorbv",
        "adagrad",
        "adamax",
        "adamp",
        "adamw",
        "adan",
        "adopt",
    ),
    *(
        "lamb",
        "laprop",
        "lars",
        "lion",
        "madgrad",
        "mars",
        "muon",
        "nadamw",
        "novograd",
        "radam",
        "rmsproptf",
    ),
    *("sgdp", "sgdw"),
)


@pytest.mark.parametrize("name", TIMM_OPTIMIZERS)
def test_strength_auto_meets_its_target_under_timms_optimizers(name: str) -> None:
    model = _convnet()
    groups = find_groups(model, EXAMPLE)
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=1e-3)
    sparsifier = sparsifier_of(
        model,
        groups,
        strength="auto",
        total_steps=100,
        shares=PhaseShares(0.1, 0.2, 0.2),
        target={"macs": 0.5},
    )
    _train(model, optimizer, range(100), sparsifier)
    assert sparsifier.shortfall() == ""
    masks = sk.keep_masks(model, groups, method="zeros")
    assert 0.5 - _largest_step(groups, masks, 1) <= kept_share(groups, masks).macs <= 0.5
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    dead = torch.cat(list(zero_channels(model, groups).values()))
    assert sparsifier.progress()["zero_share"] == pytest.approx(float(dead.float().mean()))


def test_strength_auto_stops_shrinking_once_the_target_is_met() -> None:
    model = _convnet()
    groups = find_groups(model, EXAMPLE)
    sparsifier = sparsifier_of(
        model, groups, strength="auto", total_steps=100, shares=NO_PARTS, target={"channels": 0.5}
    )
    optimizer = SGD(model.parameters(), lr=0.01)
    strengths: list[float] = []
    _train(model, optimizer, range(100), sparsifier, lambda: strengths.append(sparsifier.strength))
    met = strengths.index(0.0)
    assert 0 < met < 99
    assert min(strengths[:met]) > 0
    assert set(strengths[met:]) == {0.0}


@pytest.mark.parametrize(("penalty", "sizes"), [("group_lasso", [5.0, 0.5]), ("l1", [4.0, 0.4])])
def test_strength_auto_shrinks_the_channels_that_have_to_die_evenly_and_no_other(
    penalty: str, sizes: list[float]
) -> None:
    """In a linear fall to zero over nine tenths of the penalised part, at the rate a step has with momentum."""
    model = Points(x=torch.tensor([[6.0, -8.0], [-3.0, 4.0], [0.3, 0.4], [-60.0, 80.0]]))
    shares = PhaseShares(0.0, 0.0, 0.5)
    sparsifier = sparsifier_of(
        model,
        _groups(("x",), n=4),
        penalty=penalty,
        strength="auto",
        importance="magnitude",
        total_steps=200,
        shares=shares,
        target={"channels": 0.5},
    )
    before = model.x.detach().clone()
    sparsifier.step(SGD(model.parameters(), lr=0.02, momentum=0.8))
    assert sparsifier.strength == pytest.approx(1 / (0.9 * 100 * 0.1))
    assert torch.equal(model.x[[0, 3]], before[[0, 3]])
    order = 2 if penalty == "group_lasso" else torch.inf
    lost = before[1:3].norm(order, dim=1) - model.x.detach()[1:3].norm(order, dim=1)
    assert lost.tolist() == pytest.approx([size / 90 for size in sizes], rel=1e-4)


@pytest.mark.parametrize(("importance", "survivors"), [("taylor", [0, 1]), ("magnitude", [2, 3])])
def test_taylor_keeps_what_the_loss_depends_on_and_magnitude_what_is_large(
    importance: str, survivors: list[int]
) -> None:
    model = Points(x=torch.tensor([0.1, 0.2, 3.0, 4.0]))
    optimizer = SGD(model.parameters(), lr=0.01)
    sparsifier = sparsifier_of(
        model,
        _groups(("x",), n=4),
        strength="auto",
        total_steps=100,
        target={"channels": 0.5},
        importance=importance,
    )
    for step in range(100):
        # Of either sign by turns, so that the first two weights go nowhere.
        model.x.grad = torch.tensor([1.0, 1.0, 0.0, 0.0]) * (-1) ** step
        optimizer.step()
        sparsifier.step(optimizer)
    assert model.x.nonzero().flatten().tolist() == survivors
    assert sparsifier.shortfall() == ""


def test_costs_decide_between_channels_that_are_equally_important() -> None:
    model = Points(x=torch.ones(4), y=torch.ones(4))
    optimizer = SGD(model.parameters(), lr=0.01)
    sparsifier = sparsifier_of(
        model,
        _groups(("x",), ("y",), n=4),
        strength="auto",
        importance="magnitude",
        total_steps=50,
        target={"channels": 0.625},
        costs={"x": 1.0, "y": 2.0},
    )
    for _ in range(50):
        model.x.grad, model.y.grad = torch.zeros(4), torch.zeros(4)
        optimizer.step()
        sparsifier.step(optimizer)
    assert int((model.x == 0).sum()) == 0
    assert int((model.y == 0).sum()) == 3


def test_a_step_that_comes_after_the_gradients_are_gone_is_refused() -> None:
    model = Points(x=torch.ones(4))
    optimizer = SGD(model.parameters(), lr=0.01)
    sparsifier = sparsifier_of(
        model,
        _groups(("x",), n=4),
        strength="auto",
        total_steps=10,
        target={"channels": 0.5},
        importance="taylor",
    )
    optimizer.zero_grad()
    sparsifier.step(optimizer)
    with pytest.raises(TrainingError, match=r"before zero_grad\(\)"):
        sparsifier.step(optimizer)


def test_a_phase_that_could_not_reach_its_target_says_how_far_it_got() -> None:
    model = Points(x=torch.tensor([0.1, 0.2, 3.0, 4.0]))
    optimizer = SGD(model.parameters(), lr=0.0)
    sparsifier = sparsifier_of(
        model,
        _groups(("x",), n=4),
        strength="auto",
        importance="magnitude",
        total_steps=20,
        target={"channels": 0.5},
    )
    for _ in range(20):
        sparsifier.step(optimizer)
    assert sparsifier.shortfall().startswith(
        "the zeros would leave 1.000 of the channels, and 0.5 was asked for"
    )
    assert sparsifier_of(model, _groups(("x",), n=4), strength=0.1).shortfall() == ""


def test_a_penalty_that_has_met_its_target_stays_off_when_it_is_loaded() -> None:
    def start() -> tuple[nn.Module, Optimizer, sk.Sparsifier]:
        model = Points(x=torch.tensor([0.1, 0.2, 3.0, 4.0]))
        sparsifier = sparsifier_of(
            model,
            _groups(("x",), n=4),
            strength="auto",
            importance="magnitude",
            total_steps=1000,
            shares=NO_PARTS,
            target={"channels": 0.5},
        )
        return model, SGD(model.parameters(), lr=0.1), sparsifier

    model, optimizer, sparsifier = start()
    while sparsifier.strength > 0 or not sparsifier.state_dict()["steps"]:
        sparsifier.step(optimizer)
    assert torch.equal(model.x == 0, torch.tensor([True, True, False, False]))
    again, optimizer, resumed = start()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(sparsifier.state_dict())
    resumed.step(optimizer)
    assert resumed.strength == 0.0
    assert torch.equal(again.x, model.x)


def test_adaptive_thresholds_follow_the_filter_norms_at_the_start() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)).double()
    model[0].weight.data *= torch.tensor([[0.05], [1.0], [1.0], [1.0], [1.0], [20.0]])
    groups = find_groups(model, torch.zeros(1, 3).double())
    (group,) = groups.free
    of_filters = filter_norms(model, groups)[group.name]
    norms = model[0].weight.detach().norm(dim=1)
    expected = 1e-4 * norms.mean() * (of_filters.mean() / of_filters).pow(2).clamp(0.05, 20)
    relative = expected / (1e-4 * norms.mean())
    assert (relative.min(), relative.max()) == (pytest.approx(0.05), 20)  # both bounds are in play
    sparsifier = sparsifier_of(model, groups, strength=1e-3, adaptive=2.0)
    sparsifier.step(SGD(model.parameters(), lr=0.1))
    assert torch.allclose(norms - model[0].weight.detach().norm(dim=1), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_an_interrupted_run_ends_with_the_same_bits_as_an_uninterrupted_one(
    kind: str, tmp_path: Path
) -> None:
    def start(weights: dict[str, Tensor] | None = None) -> tuple[nn.Module, Optimizer, sk.Sparsifier]:
        model = _convnet()
        model.load_state_dict(weights or model.state_dict())
        optimizer = OPTIMIZERS[kind][0](model.parameters())
        groups = find_groups(model, EXAMPLE)
        sparsifier = sparsifier_of(
            model,
            groups,
            strength="auto",
            total_steps=30,
            shares=PhaseShares(0.1, 0.1, 0.2),
            target={"macs": 0.5},
            importance="taylor",
        )
        return model, optimizer, sparsifier

    def state(model: nn.Module, optimizer: Optimizer, sparsifier: sk.Sparsifier) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sparsifier": sparsifier.state_dict(),
        }

    whole = start()
    _train(whole[0], whole[1], range(30), whole[2])
    assert whole[2].progress()["zero_share"] > 0.2
    for at in (1, 8, 17, 29):
        first = start()
        _train(first[0], first[1], range(at), first[2])
        save_state(tmp_path / "state.safetensors", state(*first))
        stored = load_state(tmp_path / "state.safetensors")
        again = start(stored["model"])
        again[1].load_state_dict(stored["optimizer"])
        again[2].load_state_dict(stored["sparsifier"])
        assert again[2].progress() == first[2].progress()
        _train(again[0], again[1], range(at, 30), again[2])
        assert again[2].progress() == whole[2].progress()
        for name, value in whole[0].state_dict().items():
            assert torch.equal(value, again[0].state_dict()[name]), (at, name)


def test_project_zeroes_the_same_channels_in_an_average_of_the_weights() -> None:
    model = Points(x=torch.tensor([[0.01, 0.0], [5.0, 6.0]]), y=torch.tensor([1.0, 2.0]))
    average = copy.deepcopy(model)
    sparsifier = sparsifier_of(model, _groups(("x",), n=2), strength=1.0)
    sparsifier.step(SGD(model.parameters(), lr=0.1))
    sparsifier.project_(average)
    assert torch.equal(average.x.detach(), torch.tensor([[0.0, 0.0], [5.0, 6.0]]))
    assert torch.equal(average.y.detach(), torch.tensor([1.0, 2.0]))


def test_l1_on_weights_without_a_norm_zeroes_single_weights_too() -> None:
    model = _convnet(batchnorm=False)
    sparsifier = sparsifier_of(model, find_groups(model, EXAMPLE), penalty="l1", strength=0.1)
    _train(model, SGD(model.parameters(), lr=0.1), range(8), sparsifier)
    zeros = (model[0].weight == 0).flatten(1)
    assert bool((zeros.any(1) & ~zeros.all(1)).any())


def test_frozen_weights_are_left_alone() -> None:
    model = _convnet()
    for parameter in (*model[0].parameters(), *model[1].parameters()):
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    groups = find_groups(model, EXAMPLE)
    sparsifier = sparsifier_of(
        model, groups, strength="auto", total_steps=40, shares=NO_PARTS, target={"channels": 0.8}
    )
    _train(model, SGD(model.parameters(), lr=0.05), range(40), sparsifier)
    assert all(torch.equal(before[name], value) for name, value in model[:2].named_parameters())
    left = kept_share(groups, sk.keep_masks(model, groups, method="zeros"))
    assert left.channels <= 0.8


@pytest.mark.parametrize("strength", [1.0, "auto"])
def test_groups_that_the_optimizer_does_not_train_are_left_alone(strength: Any) -> None:
    model = _convnet()
    before = {name: value.clone() for name, value in model.named_parameters()}
    groups = find_groups(model, EXAMPLE)
    sparsifier = sparsifier_of(
        model, groups, strength=strength, total_steps=40, shares=NO_PARTS, target={"channels": 0.8}
    )
    # The scale of the first norm alone cannot make a channel zero: its shift is not trained.
    trained = [model[1].weight, *model[3:].parameters()]
    _train(model, SGD(trained, lr=0.05), range(40), sparsifier)
    assert torch.equal(before["1.bias"], model[1].bias)
    dead = zero_channels(model, groups)
    assert not dead["0"].any()
    assert dead["3"].any()


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for its device, and tensors built from Python lists."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal.default", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(refused in str(func) for refused in self.REFUSED):
            raise AssertionError(f"a step must not call {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("revive", [False, True])
def test_a_step_with_a_fixed_strength_never_waits_for_the_device(
    kind: str, penalty: str, revive: bool
) -> None:
    scattered = Member("y", 1, (4, 0, 2), 1, "producer", penalised=True)
    group = _groups(("x",), n=3).groups[0]
    groups = ChannelGroups((ChannelGroup("x", 3, (*group.members, scattered)),), ())
    model = Points(x=torch.ones(3, 2), y=torch.ones(2, 5))
    optimizer = OPTIMIZERS[kind][0](model.parameters())
    sparsifier = sparsifier_of(
        model, groups, penalty=penalty, strength=0.1, total_steps=4, shares=NO_PARTS, revive=revive
    )
    _set_gradients(model, torch.Generator().manual_seed(0))
    optimizer.step()
    before = model.x.detach().clone()
    with _NoWaiting():
        sparsifier.step(optimizer)
    assert not torch.equal(before, model.x)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoWaiting():
        sparsifier.progress()


def test_the_strength_is_zero_before_the_first_step_and_as_used_after_it() -> None:
    model = Points(x=torch.ones(2))
    sparsifier = sparsifier_of(model, _groups(("x",), n=2), strength=0.1)
    assert sparsifier.strength == 0.0
    sparsifier.step(SGD(model.parameters(), lr=0.1))
    assert sparsifier.strength == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength must be a finite number >= 0"),
        ({"strength": float("nan")}, "strength must be a finite number >= 0"),
        ({"strength": float("inf")}, "strength must be a finite number >= 0"),
        ({"costs": {}}, "costs must have a number >= 0 for every group"),
        ({"strength": "high"}, "got 'high'"),
        ({"penalty": "lasso"}, "got 'lasso'"),
        ({"strength": "auto", "target": {"macs": 0.5}}, "total_steps must be at least 1"),
        ({"strength": "auto", "total_steps": 10}, "needs a target"),
        (
            {"strength": "auto", "total_steps": 10, "target": {"macs": 0.5}, "importance": "size"},
            "got 'size'",
        ),
        (
            {"strength": "auto", "total_steps": 10, "target": {"macs": 0.5}, "penalty": "group_mcp"},
            "take 'group_lasso', or give a strength",
        ),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"round_to": -1}, "round_to must be 'auto' or at least 1"),
        (
            {"strength": "auto", "total_steps": 9, "target": {"flops": 0.5}},
            "macs, params, channels, latency",
        ),
        (
            {"strength": "auto", "total_steps": 9, "target": {"macs": 0.5, "params": 0.5}},
            "macs, params, channels, latency",
        ),
        ({"strength": "auto", "total_steps": 10, "target": {"macs": 0.001}}, "out of reach"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = _convnet()
    with pytest.raises(InputError, match=message):
        sparsifier_of(model, find_groups(model, EXAMPLE), **arguments)


def test_a_penalty_on_scales_needs_batchnorms_and_names_the_alternative() -> None:
    model = _convnet(batchnorm=False)
    with pytest.raises(InputError, match="take 'group_lasso'"):
        sparsifier_of(model, find_groups(model, EXAMPLE), penalty="scale_l1")


@pytest.mark.parametrize("penalty", [penalty for penalty in get_args(Penalty) if penalty != "group_mcp"])
@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.01)])
def test_every_penalty_makes_zeros_whose_removal_changes_nothing(
    penalty: Penalty, optimizer: Callable[[Any], Optimizer]
) -> None:
    model = _convnet()
    groups = find_groups(model, EXAMPLE)
    sparsifier = sparsifier_of(
        model, groups, penalty=penalty, strength="auto", total_steps=60, target={"macs": 0.4}
    )
    _train(model, optimizer(model.parameters()), range(60), sparsifier)
    masks = sk.keep_masks(model, groups, method="zeros")
    assert kept_share(groups, masks).macs <= 0.42
    # Channels without a scale, but with a shift, are constants: one stays to carry those that a padded layer reads.
    plan = sk.make_plan(groups, keep_carriers(model, groups, masks))
    pruned = sk.apply_plan(model, plan)
    sk.verify_cut(model, pruned, plan)
    with evaluating(model), evaluating(pruned):
        change = (model(IMAGES) - pruned(IMAGES)).abs().max() / model(IMAGES).abs().max()
    assert change < 1e-5


def test_costs_multiply_the_weights_by_the_root_of_their_ratio_to_the_mean() -> None:
    model = Points(x=torch.full((2, 4), 5.0), y=torch.full((2, 4), 5.0))
    groups = _groups(("x",), ("y",), n=2)
    sparsifier = sparsifier_of(model, groups, strength=0.1, min_channels=0, costs={"x": 3.0, "y": 1.0})
    optimizer = SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    sparsifier.step(optimizer)
    lost = [10.0 - float(p[0].detach().norm()) for p in (model.x, model.y)]
    assert lost == pytest.approx([0.1 * 2 * (3 / 2) ** 0.5, 0.1 * 2 * (1 / 2) ** 0.5], rel=1e-5)


def test_the_macs_of_a_channel_are_those_of_the_layers_that_make_and_read_it() -> None:
    model = _convnet()
    costs = sk.channel_macs(find_groups(model, EXAMPLE))
    # 3x3 filters on 8x8 maps from 3 channels, and on 4x4 maps into 16; 3x3 on 4x4 from 12, and 4 outputs.
    assert list(costs.values()) == [64 * 27 + 16 * 9 * 16, 16 * 9 * 12 + 4]


def test_models_that_cannot_be_sparsified_are_refused() -> None:
    model = _convnet()
    groups = find_groups(model, EXAMPLE)
    with pytest.raises(InputError, match="not a wrapper"):
        sparsifier_of(nn.Sequential(model), groups)
    with pytest.raises(InputError, match=r"all free channel groups are frozen: .* requires_grad=False"):
        sparsifier_of(model.requires_grad_(False), groups)
    with pytest.raises(InputError, match="no channel group"):
        sparsifier_of(model, ChannelGroups((), ()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = _convnet(), _convnet()
    sparsifier = sparsifier_of(model, find_groups(model, EXAMPLE))
    with pytest.raises(InputError, match="none of the penalised weights"):
        sparsifier.step(SGD(other.parameters(), lr=0.1))


def test_a_state_of_another_model_is_refused() -> None:
    state = sparsifier_of(Points(x=torch.ones(2)), _groups(("x",), n=2)).state_dict()
    with pytest.raises(InputError, match="other channel groups"):
        sparsifier_of(Points(y=torch.ones(2)), _groups(("y",), n=2)).load_state_dict(state)
    with pytest.raises(InputError, match="other channel groups"):
        sparsifier_of(Points(x=torch.ones(1)), _groups(("x",), n=1)).load_state_dict(state)
    automatic = sparsifier_of(
        Points(x=torch.ones(2)),
        _groups(("x",), n=2),
        strength="auto",
        total_steps=9,
        target={"channels": 0.5},
    )
    with pytest.raises(InputError, match="automatic strength"):
        automatic.load_state_dict(state)


def test_the_outcome_can_be_seen_and_its_target_moved() -> None:
    model = Points(x=torch.tensor([0.1, 0.2, 0.3, 3.0, 4.0, 5.0]))
    optimizer = SGD(model.parameters(), lr=0.01)
    sparsifier = sparsifier_of(
        model,
        _groups(("x",), n=6),
        strength="auto",
        importance="magnitude",
        total_steps=40,
        target={"channels": 0.5},
    )
    assert sparsifier.expected_masks()["x"].tolist() == [False, False, False, True, True, True]
    sparsifier.retarget({"channels": 0.7})
    assert sparsifier.expected_masks()["x"].tolist() == [False, False, True, True, True, True]
    for bad, message in (({"channels": 0.1}, "out of reach"), ({"macs": 0.5}, "a target of channels")):
        with pytest.raises(InputError, match=message):
            sparsifier.retarget(bad)
    model.x.grad = torch.zeros(6)
    for _ in range(40):
        optimizer.step()
        sparsifier.step(optimizer)
    assert (model.x == 0).tolist() == [True, True, False, False, False, False]
    with pytest.raises(InputError, match="constant strength has no target"):
        sparsifier_of(model, _groups(("x",), n=6), strength=0.1).expected_masks()


def test_a_phase_that_has_settled_takes_exactly_the_masks_channels_to_zero() -> None:
    torch.manual_seed(0)
    model = _convnet()
    groups = find_groups(model, EXAMPLE)
    arguments: dict[str, Any] = {"strength": "auto", "total_steps": 60, "target": {"macs": 0.9}}
    sparsifier, resumed = (sparsifier_of(model, groups, **arguments) for _ in range(2))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, range(5), sparsifier)
    # Not what would have been chosen: the filters that are largest.
    of_filters = filter_norms(model, groups)
    masks = {name: norm <= norm.median() for name, norm in of_filters.items()}
    sparsifier.settle(masks)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.expected_masks().items())
    assert sparsifier.shortfall()
    resumed.load_state_dict(sparsifier.state_dict())
    _train(model, optimizer, range(5, 60), resumed)
    assert not resumed.shortfall()
    assert all(torch.equal(dead, ~masks[name]) for name, dead in zero_channels(model, groups).items())
    with pytest.raises(InputError, match="other channel groups"):
        resumed.settle({name: mask[1:] for name, mask in masks.items()})
    with pytest.raises(InputError, match="which the penalty does not act on"):
        resumed.settle(masks | {"elsewhere": torch.tensor([True, False])})


def test_a_target_set_after_settling_is_chosen_for_again() -> None:
    model = Points(x=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    sparsifier = sparsifier_of(
        model,
        _groups(("x",), n=4),
        strength="auto",
        importance="magnitude",
        total_steps=9,
        target={"channels": 0.5},
    )
    sparsifier.settle({"x": torch.tensor([True, True, True, False])})
    assert sparsifier.expected_masks()["x"].tolist() == [True, True, True, False]
    sparsifier.retarget({"channels": 0.75})
    assert sparsifier.expected_masks()["x"].tolist() == [False, True, True, True]


def test_a_channel_without_a_scale_has_no_shift_either() -> None:
    model = _convnet()
    groups = find_groups(model, EXAMPLE)
    sparsifier = sparsifier_of(
        model, groups, penalty="scale_l1", strength="auto", total_steps=60, target={"macs": 0.4}
    )
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.ones_(norm.bias)
    _train(model, SGD(model.parameters(), lr=0.1, momentum=0.9), range(60), sparsifier)
    assert all(bool((norm.bias[norm.weight == 0] == 0).all()) for norm in norms)
    assert all(bool((norm.bias[norm.weight != 0] != 0).all()) for norm in norms)
    assert any(bool((norm.weight == 0).any()) for norm in norms)


@pytest.mark.parametrize("strength", [sk.AutoStrength, "auto", None])
def test_a_strength_is_a_number_or_one_of_two_objects(strength: Any) -> None:
    model = _convnet()
    with pytest.raises(InputError, match="a finite number >= 0, a ConstantStrength or an AutoStrength"):
        sk.Sparsifier(model, find_groups(model, EXAMPLE), strength=strength)


def test_an_automatic_strength_has_to_know_the_length_of_the_phase() -> None:
    with pytest.raises(InputError, match="needs total_steps"):
        sk.AutoStrength({"macs": 0.5}, None)  # type: ignore[arg-type]
