"""Code that computes a size from something that does not shrink, and how a cut module does without.

Attention is often written `qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)` with `c` the width of the
*input*: right as long as no head is gone, and no attribute can mend it. But a reshape may leave one size to torch.
Where a computed size stands in the way of a cut, the module gets a subclass of its class whose method is the same
but for -1 (or a plain number) in that place. An artifact records the places, and nothing else, so loading one runs
no foreign code.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

from torch import nn

from sparsekit.errors import InputError

_RESHAPES = ("reshape", "view")
# Attribute of the classes made here: the places they differ in.
_MARK = "_rewritten_places"


@dataclass(frozen=True, order=True)
class Place:
    """A size in a reshape: argument `argument` of call number `call` (in the order of the source) of a module's method.

    `source` is the hash of the method's text that the numbers belong to. `size` is what stands there instead: -1, or,
    where the call leaves another size to torch already, the number it has to be (the width of a head, which stays).
    """

    module: str
    method: str
    call: int
    argument: int
    source: str
    size: int = -1


class PlaceFinder:
    """Tells which places of which methods the reshapes that are being executed stand in."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._calls: dict[CodeType, tuple[str, list[ast.Call]] | None] = {}

    def computed_sizes(self, n_sizes: int) -> dict[int, Place]:
        """The sizes of the reshape that called us that are neither literals nor plain attributes, by dimension."""
        frame = _user_frame()
        module = frame.f_locals.get("self") if frame else None
        if frame is None or id(module) not in self._names:
            return {}
        method = frame.f_code.co_name
        function = getattr(type(module), method, None)
        if getattr(function, "__code__", None) is not frame.f_code:
            return {}
        if frame.f_code not in self._calls:
            self._calls[frame.f_code] = _parsed(function)
        parsed = self._calls[frame.f_code]
        if parsed is None:
            return {}
        source, calls = parsed
        line = frame.f_lineno - frame.f_code.co_firstlineno + 1
        here = [
            i
            for i, call in enumerate(calls)
            if call.lineno <= line <= (call.end_lineno or call.lineno) and len(_sizes(call)) == n_sizes
        ]
        if len(here) != 1:
            return {}
        return {
            dim: Place(self._names[id(module)], method, here[0], dim, source)
            for dim, size in enumerate(_sizes(calls[here[0]]))
            if isinstance(size, (ast.Name, ast.BinOp))
        }


def _user_frame() -> FrameType | None:
    """The innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in ("torch", "sparsekit"):
            return frame
        frame = frame.f_back
    return None


def _parsed(function: Any) -> tuple[str, list[ast.Call]] | None:
    """Hash of a method's text and its reshape calls in order; None if it cannot be taken apart safely."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        definition = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or function.__closure__:
        return None  # a closure is what super() without arguments needs
    return hashlib.sha256(text.encode()).hexdigest(), _reshape_calls(definition)


def _reshape_calls(definition: ast.AST) -> list[ast.Call]:
    calls = [
        node
        for node in ast.walk(definition)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _RESHAPES
    ]
    return sorted(calls, key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0))


def _sizes(call: ast.Call) -> list[ast.expr]:
    if len(call.args) == 1 and isinstance(call.args[0], (ast.Tuple, ast.List)):
        return call.args[0].elts
    return [] if any(isinstance(argument, ast.Starred) for argument in call.args) else call.args


def leave_sizes_to_torch_(model: nn.Module, places: Iterable[Place]) -> None:
    """Give every module named by `places` a subclass in which the size in each place is -1, in place.

    Raises InputError if there is no such module, or a method's text is not the one the places belong to.
    """
    modules = dict(model.named_modules())
    by_method: dict[tuple[str, str], list[Place]] = {}
    for place in sorted(places):
        by_method.setdefault((place.module, place.method), []).append(place)
    for (name, method), found in by_method.items():
        if name not in modules:
            raise InputError(f"a size in {name}.{method} is to be left to torch, but there is no such module")
        module = modules[name]
        earlier = [replace(place, module=name) for place in rewritten_places(module)]
        cls = original_class(module)
        function = getattr(cls, method, None)
        parsed = _parsed(function) if inspect.isfunction(function) else None
        if parsed is None or not all(_exists(place, *parsed) for place in found):
            raise InputError(
                f"{cls.__module__}.{cls.__qualname__}.{method} is not the code the cut was made for; install the "
                "versions that the artifact was written with"
            )
        # Of one place, what is written last stands.
        together = {replace(place, size=-1): place for place in (*earlier, *found)}
        module.__class__ = _subclass(cls, tuple(sorted(together.values())))


def _subclass(cls: type[nn.Module], places: tuple[Place, ...]) -> type[nn.Module]:
    methods = {
        one: _rewritten(getattr(cls, one), [place for place in places if place.method == one])
        for one in {place.method for place in places}
    }
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduced}
    made: type[nn.Module] = type(cls.__name__, (cls,), {**methods, **names, _MARK: places})
    return made


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How to copy or pickle a rewritten module: the class is made again where the copy is."""
    return _empty, (original_class(module), rewritten_places(module)), module.__dict__


def _empty(cls: type[nn.Module], places: tuple[Place, ...]) -> nn.Module:
    made = _subclass(cls, places)
    return made.__new__(made)


def _exists(place: Place, source: str, calls: Sequence[ast.Call]) -> bool:
    return (
        place.source == source
        and 0 <= place.call < len(calls)
        and 0 <= place.argument < len(_sizes(calls[place.call]))
    )


def rewritten_places(module: nn.Module) -> tuple[Place, ...]:
    """The places in which the module's code was rewritten."""
    places: tuple[Place, ...] = vars(type(module)).get(_MARK, ())
    return places


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before anything was rewritten."""
    cls = type(module)
    return cls.__bases__[0] if _MARK in vars(cls) else cls


def _rewritten(function: Any, places: Sequence[Place]) -> Callable[..., Any]:
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    calls = _reshape_calls(definition)
    for place in places:
        size = ast.copy_location(ast.parse(str(int(place.size)), mode="eval").body, calls[place.call])
        _sizes(calls[place.call])[place.argument] = size
    # Defaults are those of the original, and private names (`self.__x`) need the class around them.
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    around = ast.parse(f"class {owner if owner.isidentifier() else '_'}: pass").body[0]
    assert isinstance(around, ast.ClassDef)
    around.body = [definition]
    tree = ast.fix_missing_locations(ast.Module([around], []))
    ast.increment_lineno(
        definition, function.__code__.co_firstlineno - 1
    )  # tracebacks show the line it comes from
    namespace: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), function.__globals__, namespace)
    made: Callable[..., Any] = vars(namespace[around.name])[definition.name]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made
