"""Finds the place in the model's code of a reshape that is running."""

from __future__ import annotations

import ast
import linecache
import sys
from itertools import islice
from types import CodeType, FrameType

from torch import nn

from sparsekit.structure.places import Place
from sparsekit.surgery.rewrite_code import literal, parsed_method, size_arguments


class PlaceFinder:
    """Finds the places of reshapes while they run."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._calls: dict[CodeType, tuple[str, list[ast.Call]] | None] = {}

    def computed_sizes(self, n_sizes: int) -> dict[int, Place]:
        """Places of computed sizes in the reshape of `n_sizes` sizes that is running, by dimension.

        A size is computed if it is neither a literal nor an attribute. Empty where the reshape cannot be told.
        """
        return {dim: place for dim, (place, number) in self._sizes(n_sizes).items() if number is None}

    def literal_sizes(self, n_sizes: int) -> dict[int, Place]:
        """Places of sizes that are written as numbers, in the same way."""
        return {dim: place for dim, (place, number) in self._sizes(n_sizes).items() if number is not None}

    def _sizes(self, n_sizes: int) -> dict[int, tuple[Place, int | None]]:
        """The place of each size that is no attribute, and its number if it is a literal."""
        frame = _user_frame()
        # A method may call its first argument something else than `self`.
        first = frame.f_code.co_varnames[:1] if frame else ()
        module = frame.f_locals.get(first[0]) if frame and first else None
        if frame is None or id(module) not in self._names:
            return {}
        method = frame.f_code.co_name
        function = getattr(type(module), method, None)
        if getattr(function, "__code__", None) is not frame.f_code:
            return {}
        if frame.f_code not in self._calls:
            self._calls[frame.f_code] = parsed_method(function)
        parsed = self._calls[frame.f_code]
        if parsed is None:
            return {}
        source, calls = parsed
        here = [
            i for i, call in enumerate(calls) if _runs(call, frame) and len(size_arguments(call)) == n_sizes
        ]
        if len(here) != 1:
            return {}
        return {
            dim: (Place(self._names[id(module)], method, here[0], dim, source), literal(size))
            for dim, size in enumerate(size_arguments(calls[here[0]]))
            if not isinstance(size, ast.Attribute)
        }


def _runs(call: ast.Call, frame: FrameType) -> bool:
    """Whether a call of a method may be the one that a frame is at: by its line, and its last column if known."""
    line = frame.f_lineno - frame.f_code.co_firstlineno + 1
    if not call.lineno <= line <= (call.end_lineno or call.lineno):
        return False
    if not hasattr(frame.f_code, "co_positions"):  # Python 3.10: two calls on one line cannot be told apart
        return True
    _, end_line, _, end = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    if end_line is None or end is None or call.end_col_offset is None:
        return True
    last = end_line - frame.f_code.co_firstlineno + 1
    # A method is parsed without the indentation that it has in its class, and may have been compiled like that.
    before: int = end - call.end_col_offset
    return last == call.end_lineno and before in (0, _indentation(frame.f_code))


def _indentation(code: CodeType) -> int:
    first = linecache.getline(code.co_filename, code.co_firstlineno)
    return len(first) - len(first.lstrip())


def _user_frame() -> FrameType | None:
    """The innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in ("torch", "sparsekit"):
            return frame
        frame = frame.f_back
    return None
