"""Finds the place in the model's code of a reshape or a quotient that is running."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import nn

from sparsekit.coupling.named_integers import NamedInt
from sparsekit.structure.places import Attribute, Place
from sparsekit.surgery.rewrite_code import Site, calls_attention, parsed_method, size_arguments


@dataclass(frozen=True)
class _Spot:
    """Where the model's code is: its module, the names of the functions from a method on, and the text of the last."""

    module: str
    method: str
    source: str
    sites: list[Site]
    frame: FrameType
    code: CodeType

    @property
    def line(self) -> int:
        """The line that runs, counted from the first of the function."""
        return self.frame.f_lineno - self.code.co_firstlineno + 1


class PlaceFinder:
    """Finds the places of reshapes and quotients while they run."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._parsed: dict[CodeType, tuple[str, list[Site]] | None] = {}
        self.quotients: dict[Place, Attribute] = {}

    def computed_sizes(self, n_sizes: int) -> dict[int, Place]:
        """Places of computed sizes in the reshape of `n_sizes` sizes that is running, by dimension.

        A size is computed if it is neither a literal nor an attribute. Empty where the reshape cannot be told.
        """
        spot = self._spot()
        if spot is None:
            return {}
        here = [
            i
            for i, call in enumerate(spot.sites)
            if isinstance(call, ast.Call)
            and not calls_attention(call)
            and call.lineno <= spot.line <= (call.end_lineno or call.lineno)
            and len(size_arguments(call)) == n_sizes
        ]
        if len(here) != 1:
            return {}
        return {
            dim: Place(spot.module, spot.method, here[0], dim, spot.source)
            for dim, size in enumerate(size_arguments(spot.sites[here[0]]))
            if isinstance(size, (ast.Name, ast.BinOp))
        }

    def note_quotient(self, divisor: Attribute, quotient: int) -> None:
        """Note the quotient by an attribute that is being computed: it has to stay when the attribute changes."""
        self._note(divisor, quotient, lambda site: isinstance(site, ast.BinOp))

    def note_attention(self, num_heads: Any) -> None:
        """Note that torch's attention is called with an attribute as its number of heads."""
        if isinstance(num_heads, NamedInt):
            self._note(num_heads.attribute, 1, calls_attention)

    def _note(self, attribute: Attribute, size: int, is_kind: Callable[[Site], bool]) -> None:
        spot = self._spot()
        if spot is None:
            return
        here = [
            i
            for i, site in enumerate(spot.sites)
            if is_kind(site) and site.lineno <= spot.line <= (site.end_lineno or site.lineno)
        ]
        if len(here) > 1:
            here = [i for i in here if _runs(spot.sites[i], spot)]
        if len(here) == 1:
            self.quotients[Place(spot.module, spot.method, here[0], 0, spot.source, size)] = attribute

    def _spot(self) -> _Spot | None:
        """Where the innermost code outside torch and this package is; None if it cannot be rewritten."""
        frame = inner = _user_frame()
        names: list[str] = []
        parsed: list[tuple[CodeType, tuple[str, list[Site]]]] = []
        while frame is not None:
            frame = _enclosing(frame)
            owner = _first_argument(frame)
            function = getattr(type(owner), frame.f_code.co_name, None) if id(owner) in self._names else None
            is_method = getattr(function, "__code__", None) is frame.f_code
            caller = frame.f_back
            if not is_method:
                function = caller.f_globals.get(frame.f_code.co_name) if caller else None
            if getattr(function, "__code__", None) is not frame.f_code:
                return None
            if frame.f_code not in self._parsed:
                self._parsed[frame.f_code] = parsed_method(function)
            found = self._parsed[frame.f_code]
            if found is None:
                return None
            names.append(frame.f_code.co_name)
            parsed.append((frame.f_code, found))
            if is_method and inner is not None:
                code, (source, sites) = parsed[0]
                return _Spot(self._names[id(owner)], "/".join(names[::-1]), source, sites, inner, code)
            frame = caller
        return None


def _enclosing(frame: FrameType) -> FrameType:
    """The frame of the function around a comprehension or lambda that it calls directly; any other frame itself."""
    while frame.f_code.co_name.startswith("<") and frame.f_back is not None:
        if frame.f_code not in frame.f_back.f_code.co_consts:
            return frame
        frame = frame.f_back
    return frame


def _first_argument(frame: FrameType) -> object:
    return frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None


def _runs(site: Site, spot: _Spot) -> bool:
    """Whether the site is what the frame computes at this moment; lines and columns of parsed text are dedented."""
    positions = getattr(spot.frame.f_code, "co_positions", None)  # Python 3.11
    if positions is None:
        return False
    line, end_line, column, end_column = list(positions())[spot.frame.f_lasti // 2]
    first = spot.code.co_firstlineno - 1
    text = inspect.getsourcelines(spot.code)[0][0]
    indent = len(text) - len(text.lstrip())
    at = (site.lineno + first, (site.end_lineno or 0) + first)
    columns = (site.col_offset + indent, (site.end_col_offset or 0) + indent)
    return at == (line, end_line) and columns == (column, end_column)


def _user_frame() -> FrameType | None:
    """The innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in ("torch", "sparsekit"):
            return frame
        frame = frame.f_back
    return None
