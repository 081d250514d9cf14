"""Make timm's optimizer and schedule for the options of a phase."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from torch import nn

from sparsekit.errors import InputError
from sparsekit.training.options import SCHEDULES, TrainOptions


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """timm's optimizer for these options. Raises InputError for an unknown name, and for arguments that do not fit."""
    known = [str(name) for name in list_optimizers()]
    if options.optimizer.lower() not in known:
        near = difflib.get_close_matches(options.optimizer.lower(), known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.optim.list_optimizers() lists the names."
        raise InputError(f"unknown optimizer {options.optimizer!r}; {hint}")
    try:
        return create_optimizer_v2(
            model,
            opt=options.optimizer,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            **options.optimizer_args,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"optimizer {options.optimizer!r} cannot be made with lr {options.lr}, "
            f"momentum {options.momentum}, weight decay {options.weight_decay} and "
            f"{dict(options.optimizer_args)} ({error})."
        ) from error


def make_scheduler(optimizer: torch.optim.Optimizer, options: TrainOptions, updates: int) -> Any:
    """timm's schedule for these options; `updates` is how many an epoch has."""
    name, arguments = SCHEDULES[options.schedule]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=max(options.epochs, 1),
        min_lr=options.min_lr,
        warmup_lr=options.lr / 100,
        warmup_epochs=options.warmup_epochs,  # type: ignore[arg-type]  # multiplied by updates: may be a fraction
        step_on_epochs=False,
        updates_per_epoch=updates,
        **arguments,
    )
    return scheduler
