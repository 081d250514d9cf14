"""What errors say of other errors."""

from __future__ import annotations

import pytest

from sparsekit.errors import InputError, first_line, first_names


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(), "ValueError: "),
        (InputError("one\ntwo"), "one"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_names_are_cut_short() -> None:
    assert first_names(["a", "b", "c", "d"]) == "a, b, c, d"
    assert first_names(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"
