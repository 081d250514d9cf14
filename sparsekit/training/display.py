"""Show a phase while it trains, and the metrics of an epoch."""

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
    """One epoch (1 is the first).

    loss: mean over the training images. accuracy, validation_loss: on the validation images, accuracy in [0, 1].
    train_accuracy: None under mixup and cutmix. lr: of the last update. seconds: training and validation together.
    zero_share, strength: None without a hook.
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
class ProgressDisplay:
    """Shows a bar on a terminal, a line for each epoch elsewhere, and nothing without a console."""

    console: Console | None
    bar: Progress | None = None
    task: TaskID | None = None

    def step(self, done: int, loss: float, hook: StepHook | None) -> None:
        """Show the loss after `done` batches of the phase, and the figures of the hook."""
        if self.bar is None or self.task is None:
            return
        shown = {} if hook is None else hook.progress()
        text = f"loss {loss:.4f}" + _penalty_text(shown.get("zero_share"), shown.get("strength"))
        self.bar.update(self.task, completed=done, now=text)
        self.bar.refresh()

    def epoch(self, metrics: EpochMetrics, epochs: int) -> None:
        """Show an epoch that is over; `epochs` is how many the phase has."""
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


@contextmanager
def open_display(
    console: Console | None, accelerator: Accelerator, phase: str, total: int
) -> Iterator[ProgressDisplay]:
    """The display of a phase of `total` batches, closed at the end; only the main process shows anything."""
    if console is None or not accelerator.is_main_process:
        yield ProgressDisplay(None)
    elif not console.is_terminal:
        yield ProgressDisplay(console)
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
            yield ProgressDisplay(console, bar, task)


def _penalty_text(zero_share: float | None, strength: float | None) -> str:
    zeros = "" if zero_share is None else f"  zeros {zero_share:.3f}"
    return zeros + ("" if strength is None else f"  strength {strength:.3g}")
