"""On a GPU: a step waits for nothing, launches the same kernels for any width, and makes the zeros it makes elsewhere.

Skipped where there is no GPU.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from plain import find_groups
from plain import sparsifier as sparsifier_of
from torch import nn
from torch.nn import functional as F

import sparsekit as sk
from sparsekit.options import Penalty
from sparsekit.sparsify.schedules import PhaseShares

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]
NO_PARTS = PhaseShares(0.0, 0.0, 0.0)
EXAMPLE = torch.zeros(1, 3, 8, 8)


def _network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 4),
    )


def _optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def _backward(model: nn.Module, device: str = "cuda") -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 8, 8, generator=generator).to(device)
    labels = torch.randint(4, (32,), generator=generator).to(device)
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def _sparsifier(
    model: nn.Module, penalty: Penalty, strength: float | str, *, revive: bool = False
) -> sk.Sparsifier:
    groups = find_groups(model, EXAMPLE.to(next(model.parameters()).device))
    settings: dict[str, Any] = {"strength": strength} | ({"revive": True} if revive else {})
    if strength == "auto":  # of 100,000 steps none but every thousandth decides anew
        settings |= {"total_steps": 100_000, "target": {"macs": 0.5}, "shares": NO_PARTS}
    return sparsifier_of(model, groups, penalty=penalty, **settings)


@pytest.mark.parametrize("strength", [0.01, "auto"])
@pytest.mark.parametrize("penalty", get_args(Penalty))
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("revive", [False, True])
def test_a_step_waits_for_nothing(kind: str, penalty: Penalty, strength: float | str, revive: bool) -> None:
    if strength == "auto" and (penalty == "group_mcp" or revive):
        pytest.skip("refused")
    model = _network().cuda()
    sparsifier = _sparsifier(model, penalty, strength, revive=revive)
    optimizer = _optimizer(kind, model)
    for step in range(4):
        _backward(model)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step plans
        try:
            sparsifier.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strength", [0.01, "auto"])
def test_the_number_of_kernels_does_not_depend_on_the_number_of_channels(strength: float | str) -> None:
    def launched(width: int) -> int:
        model = _network(width).cuda()
        sparsifier, optimizer = _sparsifier(model, "group_lasso", strength), _optimizer("sgd", model)
        for _ in range(2):
            _backward(model)
            optimizer.step()
            sparsifier.step(optimizer)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            sparsifier.step(optimizer)
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")

    assert 0 < launched(16) == launched(256)


# Strengths that leave some channels in this number of steps, and take others.
STRENGTHS = {
    "sgd": dict.fromkeys(get_args(Penalty), 0.04) | {"group_mcp": 0.3},
    "adamw": dict.fromkeys(get_args(Penalty), 2.3) | {"group_lasso": 1.8, "group_mcp": 1.8},
}


@pytest.mark.parametrize("penalty", get_args(Penalty))
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_zeros_are_those_of_the_cpu(kind: str, penalty: Penalty) -> None:
    zeros = {}
    for device in ("cpu", "cuda"):
        model = _network().double().to(device)
        sparsifier = sparsifier_of(
            model,
            find_groups(copy.deepcopy(model).float(), EXAMPLE.to(device)),
            penalty=penalty,
            strength=STRENGTHS[kind][penalty],
        )
        optimizer = _optimizer(kind, model)
        generator = torch.Generator().manual_seed(2)
        for _ in range(40):
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = 0.1 * noise.to(device)
            optimizer.step()
            sparsifier.step(optimizer)
        zeros[device] = [(p == 0).cpu() for p in model.parameters()]
    assert any(bool(z.any()) for z in zeros["cpu"])
    for ours, theirs in zip(zeros["cuda"], zeros["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_updates_that_a_gradient_scaler_skips_are_skipped() -> None:
    model = _network().cuda()
    sparsifier, optimizer = _sparsifier(model, "group_lasso", 0.01), _optimizer("sgd", model)
    handle = sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cuda")
    before = [p.clone() for p in model.parameters()]
    for value in (torch.inf, 1.0):
        optimizer.zero_grad()
        loss = sum(p.sum() for p in model.parameters()) * value
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert all(same) == (value == torch.inf)
    handle.remove()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_recipe_runs_on_the_gpu_and_its_cut_is_lossless(tmp_path: Path, precision: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
seed: 0
model: {{name: resnet18}}
data: {{name: digits, image_size: 32, batch_size: 64}}
device: cuda
precision: {precision}
training: {{optimizer: sgd, lr: 0.05}}
dense: {{epochs: 2}}
sparsify: {{epochs: 4, penalty: group_lasso, strength: auto}}
cut: {{target: {{macs: 0.5}}}}
finetune: {{epochs: 1}}
benchmark: {{threads: 1, rounds: 10}}
"""
    )
    command = [sys.executable, "-m", "sparsekit", "prune", str(recipe), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").exists()
