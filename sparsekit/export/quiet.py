"""Silence the tools that write and convert ONNX files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def quiet(loggers: Sequence[str]) -> Iterator[None]:
    """Drop warnings, what is printed, and what the named loggers log; exceptions pass."""
    silenced = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in silenced]
    for logger in silenced:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(silenced, levels, strict=True):
            logger.setLevel(level)
