from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparsekit.errors import DataError, FileError, InputError, TrainingError
from sparsekit.training.checkpoint import load_state
from sparsekit.training.display import EpochMetrics
from sparsekit.training.evaluate import evaluate
from sparsekit.training.loop import distillation_loss, fit, steps_per_epoch
from sparsekit.training.options import SCHEDULES, Distillation, TrainOptions
from sparsekit.training.seeding import seed_everything

CLASSES = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def net(seed: int = 0, norm: bool = True, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=not norm),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(96, CLASSES),
    )


def dataset(n: int = 40, seed: int = 1) -> TensorDataset:
    """Images whose brightest third (by rows) tells the class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = torch.randn(n, 1, 6, 6, generator=generator)
    for i, label in enumerate(labels):
        images[i, 0, 2 * label : 2 * label + 2] += 1.5
    return TensorDataset(images, labels)


def loaders(n: int = 40, batch_size: int = 8, shuffle: bool = True) -> tuple[Any, Any]:
    training = DataLoader(dataset(n), batch_size=batch_size, shuffle=shuffle, drop_last=True)
    return training, DataLoader(dataset(21, seed=2), batch_size=8)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Shrink:
    """A hook with a state: takes a little off each weight of the first layer and holds its first row at zero."""

    def __init__(self, model: nn.Sequential) -> None:
        self.weight = model[0].weight
        self.steps = 0
        self.lrs: list[float] = []

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        assert type(optimizer).__module__.startswith(("torch.optim", "timm.optim"))
        self.steps += 1
        self.lrs.append(optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            self.weight.mul_(1 - 1e-3 * self.steps)
            self.weight[0] = 0

    def project_(self, model: nn.Module) -> None:
        with torch.no_grad():
            model[0].weight[0] = 0  # type: ignore[index]

    def check_processes(self) -> None:
        pass

    def progress(self) -> dict[str, float]:
        return {"zero_share": float((self.weight == 0).float().mean()), "strength": 1e-3 * self.steps}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


BASE = TrainOptions(epochs=3, lr=0.05)


def test_training_learns(accelerator: Accelerator) -> None:
    model = net(dropout=0.0)
    data = loaders()
    before = evaluate(model, data[1], accelerator)
    seen: list[EpochMetrics] = []
    history = fit(model, data, BASE, phase="dense", seed=0, accelerator=accelerator, on_epoch=seen.append)
    after = evaluate(model, data[1], accelerator)
    assert after.accuracy > max(before.accuracy, 0.8)
    assert history == seen
    assert [metrics.epoch for metrics in history] == [1, 2, 3]
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy == after.accuracy
    assert history[-1].validation_loss == after.loss
    assert (history[0].zero_share, history[0].strength) == (None, None)
    json.dumps([asdict(metrics) for metrics in history], allow_nan=False)


RESUMED = {
    "sgd": BASE,
    "adamw, warm-up, linear": replace(
        BASE,
        optimizer="adamw",
        lr=0.01,
        warmup_epochs=1.5,
        schedule="linear",
        min_lr=1e-4,
        optimizer_args={"betas": (0.8, 0.95)},
    ),
    "average": replace(BASE, ema=0.9),
    "mixup, cutmix, smoothing": replace(BASE, mixup=0.4, cutmix=1.0, smoothing=0.1),
    "accumulation, clipping, channels last": replace(BASE, accumulate=2, clip_grad=0.5, channels_last=True),
}


class Killed(Exception):
    pass


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("hooked", [False, True])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, accelerator: Accelerator, options: TrainOptions, hooked: bool
) -> None:
    def run(name: str, kill_after: int, seed_of_caller: int) -> tuple[nn.Module, list[EpochMetrics]]:
        model = net(seed_of_caller)
        done = 0

        def stop(metrics: EpochMetrics) -> None:
            nonlocal done
            done += 1
            if done == kill_after:
                raise Killed

        history = fit(
            model,
            loaders(),
            options,
            phase="dense",
            seed=5,
            accelerator=accelerator,
            hook=Shrink(model) if hooked else None,
            teacher=Distillation(net(9)),
            state_path=tmp_path / name,
            on_epoch=stop,
        )
        return model, history

    whole, history = run("whole", 0, 0)
    for _ in range(2):
        with pytest.raises(Killed):
            run("parts", 1, 0)
    # Another model at the start, other random states: all that counts is in the file.
    resumed, history_resumed = run("parts", 0, 7)
    assert bit_equal(weights(whole), weights(resumed))
    assert [replace(m, seconds=0.0) for m in history] == [replace(m, seconds=0.0) for m in history_resumed]
    # Once more: nothing is left to do, and the result is still the same.
    again, _ = run("parts", 1, 8)
    assert bit_equal(weights(whole), weights(again))


def test_a_state_of_another_run_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    def run(path: Path, phase: str = "dense", options: TrainOptions = BASE, classes: int = CLASSES) -> None:
        model = net() if classes == CLASSES else nn.Sequential(*net()[:-1], nn.Linear(96, classes))
        fit(model, loaders(), options, phase=phase, seed=0, accelerator=accelerator, state_path=path)

    path = tmp_path / "state"
    run(path)
    with pytest.raises(FileError, match="phase was 'dense', is 'finetune'"):
        run(path, phase="finetune")
    with pytest.raises(FileError, match=r"lr was 0\.05, is 0\.1"):
        run(path, options=replace(BASE, lr=0.1))
    with pytest.raises(FileError, match="does not fit"):
        run(path, classes=4)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FileError, match="damaged"):
        run(path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_state(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    model, path = net(), tmp_path / "state"

    def poison(metrics: EpochMetrics) -> None:
        with torch.no_grad():
            model[0].weight.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"sparsify: .* in epoch 2, step 1 of 5\. Lower"):
        fit(
            model,
            loaders(),
            BASE,
            phase="sparsify",
            seed=0,
            accelerator=accelerator,
            state_path=path,
            on_epoch=poison,
        )
    state = load_state(path)
    assert len(state["history"]) == 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_weights_ruined_by_the_last_step_are_noticed(tmp_path: Path, accelerator: Accelerator) -> None:
    class Ruin(Shrink):
        def step(self, optimizer: torch.optim.Optimizer) -> None:
            super().step(optimizer)
            if self.steps == 5:
                self.weight.data.fill_(math.inf)

    model, path = net(), tmp_path / "state"
    with pytest.raises(
        TrainingError, match=r"after epoch 1, on the validation data, at a strength of 0.005\."
    ):
        fit(
            model,
            loaders(),
            BASE,
            phase="p",
            seed=0,
            accelerator=accelerator,
            hook=Ruin(model),
            state_path=path,
        )
    assert not path.exists()


def test_accumulating_small_batches_equals_one_big_batch(accelerator: Accelerator) -> None:
    small, big = net(norm=False, dropout=0.0), net(norm=False, dropout=0.0)
    options = replace(BASE, epochs=2)
    ordered = {"shuffle": False}
    fit(
        small,
        loaders(batch_size=5, **ordered),
        replace(options, accumulate=4),
        phase="p",
        seed=0,
        accelerator=accelerator,
    )
    fit(big, loaders(batch_size=20, **ordered), options, phase="p", seed=0, accelerator=accelerator)
    for a, b in zip(small.parameters(), big.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_step_is_that_of_a_bare_loop(accelerator: Accelerator) -> None:
    options = replace(BASE, schedule="constant", weight_decay=0.01)
    model, bare = net(), net()
    fit(model, loaders(), options, phase="p", seed=3, accelerator=accelerator)
    matrices = [p for p in bare.parameters() if p.ndim > 1]
    vectors = [p for p in bare.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.01}],
        lr=0.05,
        momentum=0.9,
        nesterov=True,
    )
    training, _ = loaders()
    # accelerate reads one batch ahead of the step, which matters for the random numbers only.
    for epoch in range(3):
        seed_everything(3, "p", epoch)
        bare.train()
        batches = iter(training)
        following = next(batches, None)
        while following is not None:
            (images, labels), following = following, next(batches, None)
            optimizer.zero_grad()
            F.cross_entropy(bare(images), labels).backward()
            optimizer.step()
    assert bit_equal(weights(model), weights(bare))


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.5, 2.0), (0.9, 4.0), (1.0, 1.0)])
def test_distillation_loss_against_the_formula(weight: float, temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 7, 5))
    hard = 1.25

    def softmax(logits: np.ndarray) -> np.ndarray:
        e = np.exp(logits / temperature)
        return e / e.sum(axis=1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    expected = (1 - weight) * hard + weight * temperature**2 * divergence
    found = distillation_loss(
        torch.tensor(hard), torch.from_numpy(student), torch.from_numpy(teacher), weight, temperature
    )
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_a_teacher_is_followed_and_left_as_it_was(accelerator: Accelerator) -> None:
    teacher, student = net(4), net(5, dropout=0.0)
    teacher[1].eval()
    before, modes = weights(teacher), [m.training for m in teacher.modules()]
    data = loaders()
    images = data[0].dataset.tensors[0]

    def divergence() -> float:
        with torch.no_grad():
            logits = student(images), teacher.eval()(images)
        teacher.train()
        teacher[1].eval()
        return float(distillation_loss(torch.tensor(0.0), *logits, 1.0, 1.0))

    divergence_before = divergence()
    fit(
        student,
        data,
        replace(BASE, epochs=8),
        phase="p",
        seed=0,
        accelerator=accelerator,
        teacher=Distillation(teacher, weight=1.0, temperature=2.0),
    )
    assert bit_equal(before, weights(teacher))
    assert [m.training for m in teacher.modules()] == modes
    assert divergence() < 0.5 * divergence_before


def test_the_average_is_what_remains_with_its_zeros(accelerator: Accelerator) -> None:
    model, plain = net(), net()
    options = replace(BASE, ema=0.99)
    data = loaders()
    history = fit(model, data, options, phase="p", seed=0, accelerator=accelerator, hook=Shrink(model))
    fit(plain, data, replace(options, ema=None), phase="p", seed=0, accelerator=accelerator)
    assert not bit_equal(weights(model), weights(plain))
    assert (model[0].weight[0] == 0).all()
    assert evaluate(model, data[1], accelerator).accuracy == history[-1].accuracy


def test_the_hook_runs_once_an_update_with_the_learning_rate_of_that_update(accelerator: Accelerator) -> None:
    model = net()
    hook = Shrink(model)
    options = replace(BASE, schedule="linear", accumulate=2, epochs=2, warmup_epochs=1)
    training, validation = loaders()
    history = fit(
        model, (training, validation), options, phase="p", seed=0, accelerator=accelerator, hook=hook
    )
    assert hook.steps == 2 * steps_per_epoch(training, options) == 6
    # Three updates of warm-up from lr / 100, then linearly towards 0 over six updates in all.
    expected = [0.0005, 0.017, 0.0335, *(0.05 * (1 - t / 6) for t in (3, 4, 5))]
    assert hook.lrs == pytest.approx(expected)
    assert history[-1].lr == pytest.approx(expected[-1])
    assert history[-1].zero_share == pytest.approx(1 / 6)
    assert history[-1].strength == pytest.approx(6e-3)


@pytest.mark.parametrize("n", [40, 37])
def test_mixup_takes_models_and_batches_as_they_come(accelerator: Accelerator, n: int) -> None:
    data = DataLoader(dataset(n), batch_size=8), loaders()[1]
    model = net()
    history = fit(
        model, data, replace(BASE, mixup=0.2, smoothing=0.1), phase="p", seed=0, accelerator=accelerator
    )
    assert history[-1].train_accuracy is None
    assert all(module.training for module in model.modules())


def test_the_callers_accelerator_and_generators_can_be_used_again(accelerator: Accelerator) -> None:
    accelerator.gradient_accumulation_steps = 3
    generator = torch.Generator()
    validation = loaders()[1]

    def run() -> dict[str, torch.Tensor]:
        model = net()
        training = DataLoader(dataset(), batch_size=8, shuffle=True, generator=generator)
        fit(model, (training, validation), BASE, phase="p", seed=0, accelerator=accelerator)
        assert "forward" not in model.__dict__
        return weights(model)

    assert bit_equal(run(), run())
    assert accelerator.gradient_accumulation_steps == 3


def test_phase_and_seed_give_other_random_numbers(accelerator: Accelerator) -> None:
    def run(phase: str, seed: int) -> dict[str, torch.Tensor]:
        model = net()
        fit(model, loaders(), BASE, phase=phase, seed=seed, accelerator=accelerator)
        return weights(model)

    assert bit_equal(run("a", 0), run("a", 0))
    assert not bit_equal(run("a", 0), run("b", 0))
    assert not bit_equal(run("a", 0), run("a", 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_end_where_they_should(accelerator: Accelerator, schedule: str) -> None:
    model = net()
    hook = Shrink(model)
    options = replace(BASE, schedule=schedule, min_lr=0.01)
    fit(model, loaders(), options, phase="p", seed=0, accelerator=accelerator, hook=hook)
    assert hook.lrs[0] == pytest.approx(0.05)
    assert hook.lrs == sorted(hook.lrs, reverse=True)
    assert 0.01 <= hook.lrs[-1] <= (0.05 if schedule == "constant" else 0.014)


def test_evaluate_counts_every_image_and_restores_modes(accelerator: Accelerator) -> None:
    model = net()
    model[4].eval()
    modes = [module.training for module in model.modules()]
    data = dataset(21, seed=2)
    result = evaluate(model, DataLoader(data, batch_size=8), accelerator)
    assert [module.training for module in model.modules()] == modes
    images, labels = data.tensors
    model.eval()
    with torch.no_grad():
        logits = model(images)
    assert result.count == 21
    assert result.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_mistakes(accelerator: Accelerator) -> None:
    def error(kind: type[Exception], pattern: str, data: Any = None, **changes: Any) -> None:
        with pytest.raises(kind, match=pattern):
            fit(
                net(), data or loaders(), replace(BASE, **changes), phase="p", seed=0, accelerator=accelerator
            )

    error(InputError, "schedule must be one of cosine, linear, constant, got 'cosinus'", schedule="cosinus")
    error(InputError, "unknown optimizer 'adamww'; did you mean .*adamw", optimizer="adamww")
    error(InputError, "optimizer 'sgd' cannot be made .*beta", optimizer_args={"beta": 1})
    error(InputError, "accumulate >= 1", accumulate=0)
    error(InputError, "even batch size, got 5", loaders(batch_size=5), mixup=0.2)
    error(DataError, "no batch", (DataLoader(dataset(4), batch_size=8, drop_last=True), loaders()[1]))
    with pytest.raises(DataError, match="no images"):
        evaluate(net(), DataLoader(TensorDataset(torch.zeros(0, 1)), batch_size=2), accelerator)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown(accelerator: Accelerator, terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=None)
    model = net()
    fit(
        model,
        loaders(),
        BASE,
        phase="sparsify",
        seed=0,
        accelerator=accelerator,
        hook=Shrink(model),
        console=console,
    )
    text = stream.getvalue()
    for expected in ("sparsify", "3/3", "loss", "accuracy", "zeros 0.167", "strength 0.015"):
        assert expected in text
    assert terminal or len(text.splitlines()) == 3


def test_reduced_precision_trains_and_leaves_the_model_in_full(tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = net()
        options = replace(BASE, ema=0.9)
        fit(model, loaders(), options, phase="p", seed=0, accelerator=accelerator)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert "forward" not in model.__dict__
        assert evaluate(model, loaders()[1], accelerator).accuracy > 0.5
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
