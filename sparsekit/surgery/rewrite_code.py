"""Rewrite sizes in a module's code that a cut makes wrong: in reshapes, and quotients such as the width of a head.

Attention is often written `qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)`, with `c` the width of the
input. That is wrong once a head is gone, and no attribute can mend it. So the module gets a subclass whose method has
-1, or a plain number, in that place. `q * (c // self.num_heads) ** -0.5` gets the number that the quotient was, and
`F.multi_head_attention_forward`, which checks its widths, is replaced by a function that does not. Where a method calls
a free function with such sizes, the subclass calls one of its own. An artifact records only the places: loading one
runs no foreign code.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sparsekit.errors import InputError, ModelError
from sparsekit.structure.places import Place
from sparsekit.surgery.attention import attention_forward

_RESHAPES = ("reshape", "view")
# Torch's attention as a function, and what a rewritten method calls instead.
_ATTENTION, _OPEN_ATTENTION = "multi_head_attention_forward", "_open_attention_forward"
# Where a size stands in code: a reshape call, a quotient, or a call of torch's attention.
Site = ast.Call | ast.BinOp
# Attribute of the classes made here: the places they differ in.
_MARK = "_rewritten_places"
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def leave_sizes_to_torch_(model: nn.Module, places: Iterable[Place]) -> None:
    """Give every module named by `places` a subclass with the place's size (-1: left to torch) there, in place.

    Raises InputError if there is no such module, or the text of its method is not the recorded one.
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
        parsed = _parsed_at(cls, method)
        if parsed is None or not all(_exists(place, *parsed) for place in found):
            raise InputError(
                f"{cls.__module__}.{cls.__qualname__}.{method} is not the code the cut was made for; install the "
                "versions that the artifact was written with"
            )
        # Where a place is written twice, the last size counts.
        together = {replace(place, size=-1): place for place in (*earlier, *found)}
        module.__class__ = _subclass(cls, tuple(sorted(together.values())))


def rewritten_places(module: nn.Module) -> tuple[Place, ...]:
    """The places in which the module's code was rewritten."""
    places: tuple[Place, ...] = vars(type(module)).get(_MARK, ())
    return places


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before anything was rewritten."""
    cls = type(module)
    return cls.__bases__[0] if _MARK in vars(cls) else cls


def parsed_method(function: Any) -> tuple[str, list[Site]] | None:
    """The hash of a function's text, and its sites in order; None if the function cannot be rewritten safely."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        definition = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or function.__closure__:
        return None  # a closure is what super() without arguments needs
    return hashlib.sha256(text.encode()).hexdigest(), _sites(definition)


def size_arguments(site: Site) -> list[ast.expr]:
    """The sizes that a reshape call is given, as arguments or in one tuple; empty if some are unpacked from a name.

    Those of a quotient are its two sides.
    """
    if isinstance(site, ast.BinOp):
        return [site.left, site.right]
    owner = site.func.value if isinstance(site.func, ast.Attribute) else None
    # In `torch.reshape(x, sizes)` the tensor comes first.
    arguments = site.args[1:] if isinstance(owner, ast.Name) and owner.id == "torch" else site.args
    if len(arguments) == 1 and isinstance(arguments[0], (ast.Tuple, ast.List)):
        arguments = arguments[0].elts
    return [] if any(isinstance(argument, ast.Starred) for argument in arguments) else arguments


def written_number(module: nn.Module, place: Place) -> int | None:
    """The number that is written in a place of a module's code now; None if there is none."""
    for known in rewritten_places(module):
        if replace(known, module=place.module, size=-1) == replace(place, size=-1):
            return known.size
    parsed = _parsed_at(original_class(module), place.method)
    if parsed is None or not _exists(place, *parsed):
        return None
    return literal(size_arguments(parsed[1][place.call])[place.argument])


def literal(expression: ast.expr) -> int | None:
    """The value of a whole number as it is written, such as `400` or `16 * 5 * 5`; None for anything else."""
    if isinstance(expression, ast.Constant):
        return expression.value if type(expression.value) is int else None
    if not isinstance(expression, ast.BinOp) or type(expression.op) not in _ARITHMETIC:
        return None
    left, right = literal(expression.left), literal(expression.right)
    return None if not left or not right else _ARITHMETIC[type(expression.op)](left, right)


def calls_attention(site: Site) -> bool:
    """Whether it is a call of `F.multi_head_attention_forward`."""
    return (
        isinstance(site, ast.Call) and isinstance(site.func, ast.Attribute) and site.func.attr == _ATTENTION
    )


def _parsed_at(cls: type[nn.Module], method: str) -> tuple[str, list[Site]] | None:
    """As `parsed_method`, for the last of the functions that "method/function/..." names; each calls the next.

    None if one of them cannot be rewritten.
    """
    first, *names = method.split("/")
    function: Any = getattr(cls, first, None)
    parsed = None
    for name in (*names, ""):
        parsed = parsed_method(function) if inspect.isfunction(function) else None
        if parsed is None:
            return None
        function = function.__globals__.get(name)
    return parsed


def _exists(place: Place, source: str, calls: Sequence[Site]) -> bool:
    if place.source != source or not 0 <= place.call < len(calls):
        return False
    call = calls[place.call]
    if isinstance(call, ast.BinOp) or calls_attention(call):
        return place.argument == 0 and place.size > 0
    return 0 <= place.argument < len(size_arguments(call))


def _subclass(cls: type[nn.Module], places: tuple[Place, ...]) -> type[nn.Module]:
    paths = {place: place.method.split("/") for place in places}
    methods = {
        one: _rewritten(
            getattr(cls, one), {place: path[1:] for place, path in paths.items() if path[0] == one}
        )
        for one in {path[0] for path in paths.values()}
    }
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": _reduced,
        "__prepare_scriptable__": _refuse_scripting,
    }
    made: type[nn.Module] = type(cls.__name__, (cls,), {**methods, **names, _MARK: places})
    return made


def _rewritten(function: Any, places: Mapping[Place, Sequence[str]]) -> Callable[..., Any]:
    """The function with other sizes at the places, each with the names of the functions that lead to it from here."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    sites = _sites(definition)
    called: dict[str, Callable[..., Any]] = {_OPEN_ATTENTION: attention_forward}
    for place in (place for place, path in places.items() if not path):
        _write_size_(sites[place.call], place)
    called |= {
        name: _rewritten(
            function.__globals__[name],
            {place: path[1:] for place, path in places.items() if path and path[0] == name},
        )
        for name in {path[0] for path in places.values() if path}
    }
    # Defaults are those of the original, and private names (`self.__x`) need the class around them.
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    around = ast.parse(f"class {owner if owner.isidentifier() else '_'}: pass").body[0]
    assert isinstance(around, ast.ClassDef)
    around.body = [definition]
    # What it calls in place of a global function stands around both.
    binding = ast.parse(f"def _bound({', '.join(called)}):\n    return {around.name}").body[0]
    assert isinstance(binding, ast.FunctionDef)
    binding.body.insert(0, around)
    tree = ast.fix_missing_locations(ast.Module([binding], []))
    # Tracebacks show the line that the code comes from.
    ast.increment_lineno(definition, function.__code__.co_firstlineno - 1)
    namespace: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), function.__globals__, namespace)
    made: Callable[..., Any] = vars(namespace["_bound"](**called))[definition.name]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made


def _refuse_scripting(module: nn.Module) -> nn.Module:
    """torch.jit.script calls this first. It would read the text of the original method, with the sizes of before."""
    raise ModelError(
        f"sizes in the code of {original_class(module).__name__} were rewritten by a cut, and torch.jit.script reads "
        "the text of before; take torch.jit.trace, torch.export or sparsekit.export_onnx"
    )


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How to copy or pickle a rewritten module: its class is made anew."""
    return _empty, (original_class(module), rewritten_places(module)), module.__dict__


def _empty(cls: type[nn.Module], places: tuple[Place, ...]) -> nn.Module:
    made = _subclass(cls, places)
    return made.__new__(made)


def _write_size_(site: Site, place: Place) -> None:
    size = ast.copy_location(ast.parse(str(int(place.size)), mode="eval").body, site)
    if isinstance(site, ast.Call) and calls_attention(site):
        site.func = ast.copy_location(ast.Name(_OPEN_ATTENTION, ast.Load()), site)
    elif isinstance(site, ast.BinOp):  # what it was, divided by 1
        site.left, site.right = size, ast.copy_location(ast.Constant(1), site)
    else:
        size_arguments(site)[place.argument] = size


def _sites(definition: ast.AST) -> list[Site]:
    """The reshape calls of a function, then its quotients, then its calls of torch's attention, each in order."""
    nodes = list(ast.walk(definition))
    methods = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    calls = [n for n in methods if isinstance(n.func, ast.Attribute) and n.func.attr in _RESHAPES]
    quotients = [n for n in nodes if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.FloorDiv, ast.Div))]
    attention = [n for n in methods if calls_attention(n)]

    def end(site: Site) -> tuple[int, int]:
        return site.end_lineno or 0, site.end_col_offset or 0

    return [*sorted(calls, key=end), *sorted(quotients, key=end), *sorted(attention, key=end)]
