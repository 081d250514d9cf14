"""The choice in the middle of a phase: made once, from what was learned, kept over an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import find_groups
from plain import sparsifier as sparsifier_of
from torch import nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.sparsify.late_choice import LateChoice
from sparsekit.sparsify.schedules import PhaseShares
from sparsekit.structure.masks import Masks, Scores
from sparsekit.training.checkpoint import load_state, save_state

EXAMPLE = torch.zeros(1, 3, 8, 8)
STEPS = 30


def _start(
    calls: list[Masks], penalty: Any = "group_lasso"
) -> tuple[nn.Module, torch.optim.Optimizer, LateChoice]:
    """A phase that is to lose every second channel, however important they are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sparsifier_of(
        model,
        find_groups(model, EXAMPLE),
        penalty=penalty,
        strength="auto",
        total_steps=STEPS,
        shares=PhaseShares(0.2, 0.1, 0.2),
        target={"macs": 1.0},
    )

    def choose(importance: Scores) -> tuple[Masks, dict[str, Any]]:
        calls.append(importance)
        masks = {name: torch.arange(len(values)) % 2 == 0 for name, values in importance.items()}
        return {n: m if bool(importance[n].isfinite().all()) else m | True for n, m in masks.items()}, {
            "asked": 2.0
        }

    return model, optimizer, LateChoice(sparsifier, 6, choose)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, hook: LateChoice, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), images.mean((2, 3)).argmax(1)).backward()
        optimizer.step()
        hook.step(optimizer)


def test_exactly_what_was_chosen_goes_and_the_choice_saw_what_was_learned() -> None:
    calls: list[Masks] = []
    model, optimizer, hook = _start(calls)
    _train(model, optimizer, hook, range(6))
    assert not calls
    assert hook.masks == {}
    _train(model, optimizer, hook, range(6, STEPS))
    (importance,) = calls
    assert set(importance) == {"0", "3"}
    assert all(bool((values >= 0).all()) and bool(values.any()) for values in importance.values())
    assert hook.notes == {"asked": 2.0}
    assert hook.shortfall() == ""
    assert hook.progress()["zero_share"] == 0.5
    for name, dead in sk.keep_masks(model, find_groups(model, EXAMPLE), method="zeros").items():
        assert torch.equal(dead, hook.masks[name])


def test_the_phase_is_not_over_before_all_that_was_chosen_is_zero() -> None:
    """Whatever multiple the sparsifier was told: what was settled on is cut as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sparsifier_of(
        model,
        find_groups(model, EXAMPLE),
        strength="auto",
        total_steps=60,
        shares=PhaseShares(0.1, 0.0, 0.2),
        target={"macs": 1.0},
        round_to=16,
    )
    masks = {"0": torch.arange(64) < 20}
    hook = LateChoice(sparsifier, 6, lambda importance: (masks, {}))
    _train(model, optimizer, hook, range(8))
    assert "44 of the 44 channels that were to go are not zero" in hook.shortfall()
    _train(model, optimizer, hook, range(8, 60))
    assert hook.shortfall() == ""
    assert torch.equal((model[0].weight != 0).flatten(1).any(1), masks["0"])


def test_groups_that_the_penalty_does_not_act_on_are_beyond_price() -> None:
    calls: list[Masks] = []
    model, optimizer, hook = _start(calls, penalty="scale_l1")
    _train(model, optimizer, hook, range(STEPS))
    assert bool(calls[0]["0"].isfinite().all())
    assert bool(calls[0]["3"].isinf().all())
    assert hook.progress()["zero_share"] == 0.5


@pytest.mark.parametrize("at", [3, 6, 20])
def test_an_interrupted_phase_ends_with_the_same_bits(at: int, tmp_path: Path) -> None:
    calls: list[Masks] = []
    whole, first, again = _start(calls), _start(calls), _start(calls)
    _train(*whole, range(STEPS))
    _train(*first, range(at))
    state = {
        "model": first[0].state_dict(),
        "optimizer": first[1].state_dict(),
        "hook": first[2].state_dict(),
    }
    save_state(tmp_path / "state.safetensors", state)
    for part, stored in zip(again, load_state(tmp_path / "state.safetensors").values(), strict=True):
        part.load_state_dict(stored)
    _train(*again, range(at, STEPS))
    assert again[2].notes == whole[2].notes
    assert again[2].progress() == whole[2].progress()
    assert all(torch.equal(v, again[0].state_dict()[n]) for n, v in whole[0].state_dict().items())
