"""Finds the place in the model's code of a reshape or a quotient that is running."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType
from typing import Any

from torch import nn

from sparsekit.coupling.named_integers import NamedInt
from sparsekit.structure.places import Attribute, Place
from sparsekit.surgery.rewrite_code import Site, calls_attention, literal, parsed_method, size_arguments


@dataclass(frozen=True)
class _Spot:
    """Where the model's code is: its module, the names of the functions from a method on, and the text of the last."""

    module: str
    method: str
    source: str
    sites: list[Site]
    frame: FrameType
    code: CodeType

    def running(self, is_kind: Callable[[Site], bool]) -> int | None:
        """The number of the only site of a kind that may be the one that runs; None if there is none, or several."""
        here = [i for i, site in enumerate(self.sites) if is_kind(site) and _runs(site, self)]
        return here[0] if len(here) == 1 else None


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
        return {dim: place for dim, (place, number) in self._sizes(n_sizes).items() if number is None}

    def literal_sizes(self, n_sizes: int) -> dict[int, Place]:
        """Places of sizes that are written as numbers, in the same way."""
        return {dim: place for dim, (place, number) in self._sizes(n_sizes).items() if number is not None}

    def _sizes(self, n_sizes: int) -> dict[int, tuple[Place, int | None]]:
        """The place of each size that is no attribute, and its number if it is a literal."""

        def is_kind(site: Site) -> bool:
            is_reshape = isinstance(site, ast.Call) and not calls_attention(site)
            return is_reshape and len(size_arguments(site)) == n_sizes

        spot = self._spot()
        call = None if spot is None else spot.running(is_kind)
        if spot is None or call is None:
            return {}
        return {
            dim: (Place(spot.module, spot.method, call, dim, spot.source), literal(size))
            for dim, size in enumerate(size_arguments(spot.sites[call]))
            if not isinstance(size, ast.Attribute)
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
        site = None if spot is None else spot.running(is_kind)
        if spot is not None and site is not None:
            self.quotients[Place(spot.module, spot.method, site, 0, spot.source, size)] = attribute

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
    """Whether a site may be the one that the frame is at: by its line, and its last column if known."""
    code, before = spot.frame.f_code, spot.code.co_firstlineno - 1
    if not site.lineno <= spot.frame.f_lineno - before <= (site.end_lineno or site.lineno):
        return False
    if not hasattr(code, "co_positions"):  # Python 3.10: two sites on one line cannot be told apart
        return True
    _, end_line, _, end = next(islice(code.co_positions(), spot.frame.f_lasti // 2, None))
    if end_line is None or end is None or site.end_col_offset is None:
        return True
    # A function is parsed without the indentation that it has in its class, and may have been compiled like that.
    indentation: int = end - site.end_col_offset
    return end_line - before == site.end_lineno and indentation in (0, _indentation(spot.code))


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
