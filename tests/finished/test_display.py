"""What is shown of the steps: a line each, and a bar on a terminal only."""

from __future__ import annotations

import contextlib
import io

import pytest
from rich.console import Console

from sparsekit.finished.display import StepDisplay


def test_on_no_terminal_only_lines_are_written() -> None:
    written = io.StringIO()
    with StepDisplay(Console(file=written, width=20)) as show:
        show.begin("first")
        assert list(show.over("abc")) == ["a", "b", "c"]
        show.share(0.5, 1.0)
        show.say("a line that is longer than the console [is] wide")
    assert written.getvalue() == "a line that is longer than the console [is] wide\n"


def test_on_a_terminal_a_bar_tells_how_far_the_step_is_and_goes_with_it() -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True)
    with contextlib.suppress(KeyboardInterrupt), StepDisplay(console) as show:
        for name in ("measuring layers", "repairing"):
            show.begin(name)
            show.share(1, 2)
        raise KeyboardInterrupt
    assert "measuring layers" in written.getvalue()
    assert "repairing" in written.getvalue()
    assert (
        written.getvalue().count("\x1b[?25h") == written.getvalue().count("\x1b[?25l") == 2
    )  # the cursor comes back


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with StepDisplay(None) as show:
        show.begin("first")
        show.share(1, 2)
        show.say("done")
    assert capsys.readouterr() == ("", "")
