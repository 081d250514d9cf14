"""Show the steps of a long call: what runs, how far it is, the time left, and what each step brought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_T = TypeVar("_T")


class StepDisplay:
    """Shows a bar for the step that runs, and a line for each that is over; on a terminal only, unless it is asked to.

    `console` None takes stderr if that is a terminal, and shows nothing otherwise.
    """

    def __init__(self, console: Console | None) -> None:
        own = Console(stderr=True)
        self._console = console if console is not None else (own if own.is_terminal else None)
        self._bar: Progress | None = None
        self._name = ""

    def __enter__(self) -> StepDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def begin(self, name: str) -> None:
        """Show that a step has begun."""
        self._close()
        self._name = name
        if self._console is not None and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._bar.add_task(name, total=None)

    def share(self, done: float, total: float) -> None:
        """Show how far the step is."""
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=done, total=total)

    def over(self, items: Sequence[_T]) -> Iterator[_T]:
        """Give the items of a sequence, and show how far it is."""
        for i, item in enumerate(items):
            self.share(i, len(items))
            yield item

    def say(self, text: str) -> None:
        """Print a line."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
