"""Build a network of one's own: import the function that a recipe names, call it, and look at what it returns."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from sparsekit.errors import ModelError, first_line, first_names
from sparsekit.evaluation import copied

_OURS = Path(__file__).parents[1]
_INSTALLED = ("site-packages", "dist-packages")


def import_function(reference: str) -> Callable[..., Any]:
    """The function of 'package.module:function', from the current folder or from what is installed.

    The current folder is on the path as it is for `python -m`, and stays there: the function may import more when it is
    called. Raises ModelError if there is no such module or function, or if the module cannot be imported.
    """
    module_name, _, name = reference.partition(":")
    module = _import(module_name)
    found = getattr(module, name, None)
    if found is None:
        raise ModelError(f"{_file_of(module)} has no function {name}; {_what_it_has(module, name)}")
    if isinstance(found, nn.Module) or not callable(found):
        raise ModelError(
            f"{name} of {_file_of(module)} must be a function that builds the model, got {type(found).__name__}"
        )
    function: Callable[..., Any] = found
    return function


def call_arguments(
    reference: str, args: Mapping[str, Any], offered: Mapping[str, Any | None]
) -> dict[str, Any]:
    """The keywords that the function is called with: `args`, and what is offered of its parameters that `args` leaves.

    Offered are those of `offered` that are not None. A parameter has to be named: `**kwargs` is offered nothing. Raises
    ModelError if `args` do not fit the function's signature.
    """
    function = import_function(reference)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C have none
        return copy.deepcopy(dict(args))
    name = reference.partition(":")[2]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {key: one for key, one in parameters.items() if one.kind in kinds}
    unknown = [key for key in args if key not in named]
    if unknown and all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        has = f"it has {', '.join(named)}" if named else "it takes no arguments"
        raise ModelError(f"{name} has no parameter {first_names(unknown)}; {has}")
    taken = {key: value for key, value in offered.items() if key in named and value is not None}
    keywords = {**taken, **copy.deepcopy(dict(args))}
    lacking = [key for key, one in named.items() if one.default is one.empty and key not in keywords]
    if lacking:
        raise ModelError(f"{name} needs {first_names(lacking)}, and nothing says it; set it here")
    return keywords


def create_own_model(reference: str, keywords: Mapping[str, Any]) -> nn.Module:
    """What the function returns for these keywords, as a copy on the CPU: the function may keep what it returns.

    Raises ModelError if it fails, or returns something else than a module whose sizes are known.
    """
    function = import_function(reference)
    try:
        model = function(**copy.deepcopy(dict(keywords)))
    except (Exception, SystemExit) as error:
        wanted = ", ".join(f"{key}={value!r:.40}" for key, value in keywords.items())
        raise ModelError(f"called with ({wanted}) it failed: {first_line_and_place(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"it must return a torch.nn.Module, got {type(model).__name__}")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"it returns lazy layers, whose sizes are not known ({first_names(lazy)}); run the model once in the "
            "function, or use layers that are not lazy"
        )
    return copied(model).cpu()


def hashes_of_code(reference: str, model: nn.Module) -> dict[str, str]:
    """The SHA-256 of the file of each module that the model is made by, by the module's name.

    These are the module that is named, the one that has the function, and those that have the classes of the model's
    layers. What is installed is left out.
    """
    function = inspect.unwrap(import_function(reference))
    names = {reference.partition(":")[0], getattr(function, "__module__", None) or ""}
    names |= {type(layer).__module__ for layer in model.modules()}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in sorted(names)}
    return {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
        if file is not None and Path(file).is_file() and not _is_installed(file)
    }


def first_line_and_place(error: BaseException) -> str:
    """An error's type and first line, and the line of a person's own code that it comes from, if it does."""
    text = first_line(error) if isinstance(error, Exception) else f"{type(error).__name__}: {error}"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not _is_installed(frame.filename)
    ]
    return f"{text} ({_shown(frames[-1].filename)}, line {frames[-1].lineno})" if frames else text


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            here = [path.stem for path in Path(folder).glob("*.py")]
            near = difflib.get_close_matches(name.partition(".")[0], here, n=1)
            hint = f"did you mean {near[0]}?" if near else "start in the folder that holds it"
            raise ModelError(
                f"there is no module {missing} in {folder} or among what is installed; {hint}"
            ) from error
        raise ModelError(f"{name} cannot be imported: {first_line_and_place(error)}") from error
    except (Exception, SystemExit) as error:  # a script may end the process when it is imported
        raise ModelError(f"{name} cannot be imported: {first_line_and_place(error)}") from error


def _what_it_has(module: ModuleType, wanted: str) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    near = difflib.get_close_matches(wanted, own, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"it has {first_names(own)}" if own else "it has none"


def _file_of(module: ModuleType) -> str:
    return _shown(module.__file__) if module.__file__ else module.__name__


def _shown(file: str) -> str:
    """A file as a person would write it: from the current folder, if it lies there."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _is_installed(file: str) -> bool:
    path = Path(file)
    library = {Path(sysconfig.get_path(one)) for one in ("stdlib", "platstdlib")}
    inside = any(path.is_relative_to(folder) for folder in (_OURS, *library))
    return inside or file.startswith("<") or any(part in _INSTALLED for part in path.parts)
