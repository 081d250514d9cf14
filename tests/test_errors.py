"""What errors say of other errors, and of a full disk; and that files are on the disk before their names are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sparsekit.errors import InputError, RunError, first_line, first_names
from sparsekit.files import atomic_path


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


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["of Python", "of a library that writes by itself"],
)
def test_a_full_disk_is_named_as_such_and_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "weights"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(
        RunError, match=r"weights cannot be written: no space is left on its disk\. Make room"
    ):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    sync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        told.append(("sync", os.fstat(handle).st_ino))
        sync(handle)

    def note_replace(source: Path, target: Path) -> None:
        told.append(("replace", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    path = tmp_path / "journal.json"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert told == [("sync", file), ("replace", file), ("sync", folder)]
