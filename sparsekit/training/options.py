"""Options of a training phase, and what may act in it: a hook after each update, a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from sparsekit.options import Schedule

Loader = DataLoader[Any]
# Our name of a schedule -> timm's name and arguments.
SCHEDULES: Mapping[Schedule, tuple[str, Mapping[str, Any]]] = {
    "cosine": ("cosine", {}),
    "linear": ("poly", {"decay_rate": 1.0}),
    "constant": ("constant", {}),
}


@dataclass(frozen=True)
class TrainOptions:
    """How one phase trains.

    optimizer: a timm name ("sgd" is SGD with Nesterov momentum, "momentum" without). optimizer_args: further arguments
    of it. weight_decay: leaves out biases and other one-dimensional parameters. schedule: how the learning rate goes
    from lr to min_lr ("constant": stays at lr), after it has risen linearly for warmup_epochs; it changes after each
    update. clip_grad: largest norm of the gradient. accumulate: batches for one update. smoothing: label smoothing.
    mixup, cutmix: alpha, 0 for off. ema: decay of the weight average, None for off; the phase ends with the average.
    """

    epochs: int = 10
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    clip_grad: float | None = None
    accumulate: int = 1
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    channels_last: bool = False


class StepHook(Protocol):
    """What acts on the weights after each update; the Sparsifier is one."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each update that took place, before the schedule changes the learning rate."""

    def project_(self, model: nn.Module) -> None:
        """Set to zero in `model`, a copy such as the weight average, what is zero in the trained one."""

    def progress(self) -> dict[str, float]:
        """Figures to show, "zero_share" and "strength"; called at log points and at the end of an epoch."""

    def check_processes(self) -> None:
        """Raise TrainingError if the processes have drifted apart; each calls it at the end of an epoch."""

    def state_dict(self) -> dict[str, Any]:
        """All that has to be stored to go on after an interruption."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


@dataclass(frozen=True)
class Distillation:
    """Learning from a teacher: loss (1 - weight) x CE + weight x T^2 x KL(teacher || student), at temperature T."""

    model: nn.Module
    weight: float = 0.5
    temperature: float = 2.0
