"""Train a phase: the loop of epochs and steps, its metrics, and going on after an interruption.

A step never waits for the device: losses are collected there, and read at most once a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from timm.data.mixup import Mixup, mixup_target
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from sparsekit.errors import DataError, FileError, InputError, TrainingError
from sparsekit.evaluation import eval_mode, evaluating
from sparsekit.training.checkpoint import load_state, save_state
from sparsekit.training.display import EpochMetrics, ProgressDisplay, open_display
from sparsekit.training.evaluate import evaluate_prepared, prepare_loader
from sparsekit.training.optimizers import make_optimizer, make_scheduler
from sparsekit.training.options import SCHEDULES, Distillation, Loader, StepHook, TrainOptions
from sparsekit.training.seeding import seed_everything, seed_generators

_LOG_SECONDS = 1.0
_STATE_FORMAT = 1


def fit(
    model: nn.Module,
    loaders: tuple[Loader, Loader],
    options: TrainOptions,
    *,
    phase: str,
    seed: int,
    accelerator: Accelerator,
    hook: StepHook | None = None,
    teacher: Distillation | None = None,
    state_path: Path | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    console: Console | None = None,
) -> list[EpochMetrics]:
    """Train `model` in place on `loaders`, (training, validation); return the metrics of all epochs of this phase.

    Each epoch begins with all random states (Python, NumPy, torch, the training loader's generators) seeded from (seed,
    phase, epoch). With `state_path` the complete state is written there after each epoch, before `on_epoch` is called.
    If that file exists, training goes on after its last epoch, and ends with the weights of an uninterrupted run;
    `on_epoch` is called for new epochs only. `teacher` sees the same images, in eval mode. The model stays on the
    accelerator's device; what else was prepared with this accelerator is released.

    Raises InputError (options), DataError (no batch), FileError (a state file of another run) and TrainingError (loss
    not finite; the state file is then the one of the epoch before).
    """
    _check(options, loaders[0])
    accumulated_before = accelerator.gradient_accumulation_steps
    parts = _assemble(model, loaders, options, accelerator, hook, teacher)
    header = {"format": _STATE_FORMAT, "phase": phase, "seed": seed, "options": asdict(options)}
    total = options.epochs * len(parts.training)
    try:
        history = _resume(state_path, header, parts)
        with open_display(console, accelerator, phase, total) as display, _teaching(teacher, accelerator):
            for epoch in range(len(history), options.epochs):
                seed_everything(seed, phase, epoch)
                seed_generators(parts.training, (seed, phase, epoch))
                metrics = _run_epoch(parts, display, phase, epoch)
                history.append(metrics)
                if state_path is not None and accelerator.is_main_process:
                    epochs = [asdict(past) for past in history]
                    save_state(state_path, {**header, "history": epochs, **_state(parts)})
                accelerator.wait_for_everyone()
                display.epoch(metrics, options.epochs)
                if on_epoch is not None:
                    on_epoch(metrics)
        if parts.ema is not None:
            model.load_state_dict(parts.ema.module.state_dict())
    finally:
        _release(parts, accelerated_forward=accelerator.num_processes > 1)
        accelerator.gradient_accumulation_steps = accumulated_before
    return history


def steps_per_epoch(loader: Loader, options: TrainOptions, accelerator: Accelerator | None = None) -> int:
    """How many updates an epoch has; the last may have fewer than `accumulate` batches.

    Give the accelerator of a loader that is not prepared yet: its processes share the batches.
    """
    shared = loader if accelerator is None else prepare_loader(loader, accelerator)
    return math.ceil(len(shared) / options.accumulate)


def distillation_loss(
    hard: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, weight: float, temperature: float
) -> torch.Tensor:
    """(1 - weight) x hard + weight x T^2 x KL(softmax(teacher / T) || softmax(student / T)).

    student, teacher: logits (n, classes). The divergence is averaged over n. Source: Hinton et al. 2015, arXiv
    1503.02531.
    """
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * hard + weight * temperature**2 * soft


@dataclass(frozen=True)
class _Parts:
    """What one call of `fit` works with; `forward` is the model, or its wrapper in a run of several processes."""

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    stepper: Any
    scheduler: Any
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    training: Loader
    validation: Loader
    options: TrainOptions
    accelerator: Accelerator
    hook: StepHook | None
    teacher: Distillation | None


def _check(options: TrainOptions, loader: Loader) -> None:
    if options.schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {options.schedule!r}.")
    if options.epochs < 0 or options.accumulate < 1:
        raise InputError(
            f"epochs must be >= 0 and accumulate >= 1, got {options.epochs} and {options.accumulate}."
        )
    if len(loader) == 0:
        raise DataError("the training loader has no batch; give more images or a smaller batch size.")
    if (options.mixup or options.cutmix) and (loader.batch_size or 2) % 2:
        raise InputError(f"mixup and cutmix need an even batch size, got {loader.batch_size}.")


def _assemble(
    model: nn.Module,
    loaders: tuple[Loader, Loader],
    options: TrainOptions,
    accelerator: Accelerator,
    hook: StepHook | None,
    teacher: Distillation | None,
) -> _Parts:
    model.to(accelerator.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    # The average is copied before accelerate puts its own forward, bound to the original, on the model.
    ema = None if options.ema is None else ModelEmaV3(model, decay=options.ema, use_warmup=True)
    optimizer = make_optimizer(model, options)
    training = prepare_loader(loaders[0], accelerator)
    accelerator.step = 0
    accelerator.gradient_accumulation_steps = options.accumulate
    if accelerator.scaler is not None:
        # The loss scale starts anew in each phase: a resumed process does not have the one of the phase before.
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    return _Parts(
        model=model,
        forward=accelerator.prepare_model(model) if accelerator.num_processes > 1 else model,
        optimizer=optimizer,
        stepper=accelerator.prepare_optimizer(optimizer),
        scheduler=make_scheduler(optimizer, options, steps_per_epoch(training, options)),
        ema=ema,
        mixup=_make_mixup(model, training, options),
        training=training,
        validation=prepare_loader(loaders[1], accelerator),
        options=options,
        accelerator=accelerator,
        hook=hook,
        teacher=teacher,
    )


def _make_mixup(model: nn.Module, loader: Loader, options: TrainOptions) -> Mixup | None:
    if not (options.mixup or options.cutmix):
        return None
    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        device = next(model.parameters()).device
        with evaluating(model):
            classes = model(next(iter(loader))[0][:1].to(device)).shape[1]
    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )


def _resume(state_path: Path | None, header: Mapping[str, Any], parts: _Parts) -> list[EpochMetrics]:
    if state_path is None or not state_path.exists():
        return []
    state = load_state(state_path)
    for key, wanted in header.items():
        if not isinstance(state, dict) or state.get(key) != wanted:
            raise FileError(
                f"{state_path} is the training state of another run: {_difference(key, state, wanted)}. "
                "Go on with what the run was started with, or delete the file."
            )
    try:
        parts.model.load_state_dict(state["model"])
        parts.optimizer.load_state_dict(state["optimizer"])
        if parts.ema is not None:
            parts.ema.module.load_state_dict(state["ema"])
        if parts.accelerator.scaler is not None and state["scaler"] is not None:
            parts.accelerator.scaler.load_state_dict(state["scaler"])
        if parts.hook is not None:
            parts.hook.load_state_dict(state["hook"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise FileError(
            f"{state_path} does not fit this model, optimizer or penalty ({error}). Delete it to start again."
        ) from error
    return [EpochMetrics(**metrics) for metrics in state["history"]]


def _difference(key: str, state: Any, wanted: Any) -> str:
    found = state.get(key) if isinstance(state, dict) else None
    if isinstance(found, dict) and isinstance(wanted, dict):
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        return "; ".join(f"{name} was {found.get(name)!r}, is {wanted[name]!r}" for name in changed)
    return f"{key} was {found!r}, is {wanted!r}"


@contextmanager
def _teaching(teacher: Distillation | None, accelerator: Accelerator) -> Iterator[None]:
    with nullcontext() if teacher is None else eval_mode(teacher.model.to(accelerator.device)):
        yield


def _run_epoch(parts: _Parts, display: ProgressDisplay, phase: str, epoch: int) -> EpochMetrics:
    start = time.perf_counter()
    loss, train_accuracy, lr = _train_epoch(parts, display, phase, epoch)
    if parts.hook is not None:
        parts.hook.check_processes()
    if parts.accelerator.num_processes > 1:
        # BatchNorm statistics differ between processes: all take those of the first, which are stored.
        for module in (parts.model, *([] if parts.ema is None else [parts.ema.module])):
            for buffer in module.buffers():
                buffer.copy_(broadcast(buffer))
    validated = parts.model
    if parts.ema is not None:
        validated = parts.ema.module
        if parts.hook is not None:
            parts.hook.project_(validated)
    result = evaluate_prepared(validated, parts.validation, parts.accelerator)
    if not math.isfinite(result.loss):
        raise _not_finite(phase, f"after epoch {epoch + 1}, on the validation data", parts.hook)
    shown = {} if parts.hook is None else parts.hook.progress()
    return EpochMetrics(
        phase=phase,
        epoch=epoch + 1,
        loss=loss,
        accuracy=result.accuracy,
        validation_loss=result.loss,
        train_accuracy=train_accuracy,
        lr=lr,
        seconds=time.perf_counter() - start,
        zero_share=shown.get("zero_share"),
        strength=shown.get("strength"),
    )


def _train_epoch(
    parts: _Parts, display: ProgressDisplay, phase: str, epoch: int
) -> tuple[float, float | None, float]:
    """The mean loss, the accuracy on the training images (None under mixup), the learning rate of the last update."""
    accelerator, n_batches = parts.accelerator, len(parts.training)
    losses = torch.zeros(n_batches, device=accelerator.device)
    # correct, seen
    counts = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    update = epoch * steps_per_epoch(parts.training, parts.options)
    lr, logged, next_log = 0.0, 0, time.perf_counter() + _LOG_SECONDS
    parts.forward.train()
    for batch, (images, labels) in enumerate(parts.training):
        with accelerator.accumulate(parts.forward):
            loss, logits = _loss(parts, images, labels)
            losses[batch] = loss.detach()
            if parts.mixup is None:
                counts[0] += (logits.argmax(dim=1) == labels).sum()
                counts[1] += len(labels)
            lr = parts.optimizer.param_groups[0]["lr"]
            update += _update(parts, loss, update)
        if time.perf_counter() >= next_log:
            recent = _finite_mean(losses[logged : batch + 1], phase, epoch, logged, n_batches, parts.hook)
            display.step(epoch * n_batches + batch + 1, recent, parts.hook)
            logged, next_log = batch + 1, time.perf_counter() + _LOG_SECONDS
    losses = accelerator.reduce(losses, reduction="mean")
    loss_mean = _finite_mean(losses, phase, epoch, 0, n_batches, parts.hook)
    correct, seen = accelerator.reduce(counts, reduction="sum").tolist()
    return loss_mean, correct / seen if seen else None, lr


def _loss(parts: _Parts, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    options, targets = parts.options, labels
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if parts.mixup is not None:
        if len(images) % 2:
            # An odd last batch has no partner for each image: it stays as it is.
            targets = mixup_target(labels, parts.mixup.num_classes, smoothing=options.smoothing)  # type: ignore[no-untyped-call]
        else:
            images, targets = parts.mixup(images, labels)
    with parts.accelerator.autocast():
        logits = parts.forward(images)
    logits = logits.float()
    # Mixed targets are already smoothed.
    smoothing = 0.0 if parts.mixup is not None else options.smoothing
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    if parts.teacher is not None:
        with torch.no_grad(), parts.accelerator.autocast():
            taught = parts.teacher.model(images)
        loss = distillation_loss(
            loss, logits, taught.float(), parts.teacher.weight, parts.teacher.temperature
        )
    return loss, logits.detach()


def _update(parts: _Parts, loss: torch.Tensor, update: int) -> bool:
    """Compute gradients and update, unless more batches are to be accumulated first; returns whether it did."""
    accelerator, options = parts.accelerator, parts.options
    accelerator.backward(loss)
    if not accelerator.sync_gradients:
        return False
    if options.clip_grad is not None:
        accelerator.clip_grad_norm_(parts.forward.parameters(), options.clip_grad)
    parts.stepper.step()
    # A step that was skipped, for overflow in half precision, changed no weight: there is nothing to shrink.
    if parts.hook is not None and not parts.stepper.step_was_skipped:
        parts.hook.step(parts.optimizer)
    parts.stepper.zero_grad()
    if parts.ema is not None:
        parts.ema.update(parts.model, step=update + 1)
    parts.scheduler.step_update(update + 1)
    return True


def _finite_mean(
    losses: torch.Tensor, phase: str, epoch: int, first: int, n_batches: int, hook: StepHook | None
) -> float:
    values = losses.cpu()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        raise _not_finite(phase, f"in epoch {epoch + 1}, step {first + int(bad[0]) + 1} of {n_batches}", hook)
    return float(values.mean())


def _not_finite(phase: str, where: str, hook: StepHook | None) -> TrainingError:
    strength = None if hook is None else hook.progress().get("strength")
    at = "" if strength is None else f", at a strength of {strength:.3g}"
    return TrainingError(
        f"{phase}: the loss became NaN or infinite {where}{at}. Lower the learning rate or the strength "
        "of the penalty, add warm-up epochs, clip gradients (clip_grad: 1.0), or train in full precision."
    )


def _state(parts: _Parts) -> dict[str, Any]:
    scaler = parts.accelerator.scaler
    return {
        "model": dict(parts.model.state_dict()),
        "optimizer": parts.optimizer.state_dict(),
        "ema": None if parts.ema is None else dict(parts.ema.module.state_dict()),
        "scaler": None if scaler is None else scaler.state_dict(),
        "hook": None if parts.hook is None else parts.hook.state_dict(),
    }


def _release(parts: _Parts, *, accelerated_forward: bool) -> None:
    if accelerated_forward:
        parts.accelerator.unwrap_model(parts.forward, keep_fp32_wrapper=False)
        parts.model.__dict__.pop("forward", None)
    if parts.options.channels_last:
        parts.model.to(memory_format=torch.contiguous_format)
    parts.accelerator.free_memory()
