"""Write files atomically and for good, tell whether one has changed, and recognise a pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsekit.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any exception it is removed.

    A reader sees the old file or the new one, never half of one, also after a power cut: what was written is on the
    disk before its name is. Raises RunError if the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes files private (0600); give the result the permissions any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        if _is_full(error):
            raise RunError(
                f"{path} cannot be written: no space is left on its disk. Make room, and do it again; a run goes on "
                "with --resume."
            ) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    with suppress(PermissionError):  # Windows opens no folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `atomic_path` left when its process was killed, by its name."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_full(error: Exception) -> bool:
    """Whether it failed for want of space. Libraries that write files by themselves say so in the text alone."""
    return getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def is_pickle(path: Path) -> bool:
    """Whether a file looks like what torch.save and pickle write (a zip archive, or a bare pickle), whatever its name.

    A safetensors file does not: it begins with the length of its header, which may be any bytes, and then a brace.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:9] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")
