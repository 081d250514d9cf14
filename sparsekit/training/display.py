"""What a phase shows while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sparsekit.training.options import StepHook


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch (1 is the first): mean training loss, accuracy in [0, 1] on the validation data, last lr.

    train_accuracy is None under mixup and cutmix, zero_share and strength are None without a hook. seconds
    covers training and validation.
    """

    phase: str
    epoch: int
    loss: float
    accuracy: float
    validation_loss: float
    train_accuracy: float | None
    lr: float
    seconds: float
    zero_share: float | None
    strength: float | None


@dataclass(frozen=True)
class Display:
    """A bar on a terminal, a line an epoch elsewhere, nothing without a console."""

    console: Console | None
    bar: Progress | None = None
    task: TaskID | None = None

    def step(self, done: int, loss: float, hook: StepHook | None) -> None:
        if self.bar is None or self.task is None:
            return
        shown = {} if hook is None else hook.progress()
        text = f"loss {loss:.4f}" + _penalty_text(shown.get("zero_share"), shown.get("strength"))
        self.bar.update(self.task, completed=done, now=text)
        self.bar.refresh()

    def epoch(self, metrics: EpochMetrics, epochs: int) -> None:
        if self.console is None:
            return
        text = f"loss {metrics.loss:.4f}" + _penalty_text(metrics.zero_share, metrics.strength)
        if self.bar is None or self.task is None:
            line = (
                f"{metrics.phase} {metrics.epoch}/{epochs}  {text}  accuracy {metrics.accuracy:.4f}  "
                f"lr {metrics.lr:.3g}  {metrics.seconds:.1f} s"
            )
            self.console.print(line, highlight=False, soft_wrap=True)
            return
        done = (self.bar.tasks[0].total or 0) * metrics.epoch / epochs
        accuracy = f"accuracy {metrics.accuracy:.4f}"
        self.bar.update(
            self.task, completed=done, now=text, accuracy=accuracy, epoch=f"{metrics.epoch}/{epochs}"
        )
        self.bar.refresh()


def _penalty_text(zero_share: float | None, strength: float | None) -> str:
    zeros = "" if zero_share is None else f"  zeros {zero_share:.3f}"
    return zeros + ("" if strength is None else f"  strength {strength:.3g}")


@contextmanager
def displaying(
    console: Console | None, accelerator: Accelerator, phase: str, total: int
) -> Iterator[Display]:
    if console is None or not accelerator.is_main_process:
        yield Display(None)
    elif not console.is_terminal:
        yield Display(console)
    else:
        columns = (
            TextColumn("{task.description} {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.fields[now]}  {task.fields[accuracy]}"),
            TimeRemainingColumn(),
        )
        # Refreshed by hand at log points: a refreshing thread would take time from the training.
        with Progress(*columns, console=console, auto_refresh=False) as bar:
            task = bar.add_task(phase, total=total, epoch="", now="", accuracy="")
            yield Display(console, bar, task)
