"""The exceptions sparsekit raises on purpose.

    SparsekitError                  base; the command line prints its message, never a traceback
    ├── InputError                  what the user gave is wrong (exit code 2)
    │   ├── RecipeError             the recipe file or a --set override
    │   ├── DataError               images, class folders, splits
    │   ├── ModelError              a model name, its arguments, or a model that cannot be analysed
    │   └── FileError               a checkpoint, an artifact, an ONNX file, an output directory
    └── RunError                    the run failed, or the machine did (exit code 1)
        ├── TrainingError           the loss became NaN or infinite
        └── VerificationError       a proof failed: masked and cut model, artifact, or ONNX disagree

A message says what is wrong, where, what was found, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

_SHOWN = 4


class SparsekitError(Exception):
    """Base of every exception raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1


class InputError(SparsekitError):
    """What the user gave is wrong."""

    exit_code: ClassVar[int] = 2


class RecipeError(InputError):
    """A recipe, or an override of one of its keys, is wrong."""


class DataError(InputError):
    """Images, class folders or splits are missing, empty or unreadable."""


class ModelError(InputError):
    """A model is unknown, cannot be built, or cannot be analysed."""


class FileError(InputError):
    """A checkpoint, artifact, ONNX file or directory is missing, damaged, or not what was asked for."""


class RunError(SparsekitError):
    """The run failed for a reason that is not the user's input."""


class TrainingError(RunError):
    """Training cannot go on: the loss is not finite."""


class VerificationError(RunError):
    """Two things that must agree do not: masked and cut model, a saved artifact, or torch and ONNX Runtime."""


def first_line(error: Exception) -> str:
    """The type of an exception and the first line of its text, to quote in a message; of our own, the text alone."""
    text = str(error) if isinstance(error, SparsekitError) else f"{type(error).__name__}: {error}"
    return text.partition("\n")[0]


def first_names(names: Sequence[str]) -> str:
    """The first four names, and how many more there are, to quote in a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
