"""Read YAML and overrides into a draft: plain values, not checked yet, and where each was written."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from sparsekit.errors import RecipeError
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import nested_spec

# The core schema of YAML 1.2.2, section 10.3.2. PyYAML follows YAML 1.1, where 1e-4 is a text, 010 is eight, 1:30 is
# ninety, and no, on and off are booleans.
_TAG = "tag:yaml.org,2002:"
_CORE_TAGS: tuple[tuple[str, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
)


# A few lines of nested aliases can stand for billions of values. The longest recipe of ours has 150.
_MOST_NODES, _MOST_LEVELS, _LONGEST_TEXT = 10_000, 50, 1_000_000


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own way to replace its rules)


class Dumper(yaml.SafeDumper):
    """Writes texts in quotes if PyYAML's rules or the core ones would take them for something else."""


for _name, _pattern, _first in _CORE_TAGS:
    # The empty text is null; it has no first character, and PyYAML looks it up under "".
    _starts = [*_first, ""] if _name == "null" else [*_first]
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _starts)


@dataclass(frozen=True)
class Position:
    """Where a value was written; `order` sorts the lines of the file, and then the overrides as given."""

    label: str
    order: tuple[int, int]


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a recipe, and where."""

    text: str
    place: Position


@dataclass
class RecipeDraft:
    """A recipe as it was written: plain values, and the place of every key by its path."""

    root: Position
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], Position] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # keys whose value is not plain data; `mistakes` has them
    overrides: int = 0

    def place(self, path: tuple[str, ...]) -> Position:
        """The place of the key at `path`, or of the nearest section around it that was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.root)


def read_draft(path: Path) -> RecipeDraft:
    """Read a recipe file. Raises RecipeError if it cannot be read or is no YAML mapping."""
    draft = RecipeDraft(Position(str(path), (0, 0)))
    node = _compose(_read_text(path))
    if isinstance(node, _Syntax):
        raise RecipeError(f"{node.text} ({path}{f', line {node.line}' if node.line else ''})")
    if node is None:
        raise RecipeError(f"{path} is empty; `sparsekit init` writes a recipe to start from")
    if not isinstance(node, yaml.MappingNode):
        sections = ", ".join(Recipe.model_fields)
        raise RecipeError(
            f"a recipe must be a mapping with the keys {sections}, got {_node_word(node)} ({path})"
        )

    def place_of(node: yaml.Node) -> Position:
        line = node.start_mark.line + 1
        return Position(f"{path}, line {line}", (0, line))

    draft.values = _Reading(draft, place_of, frozenset()).value(node, ())
    return draft


def apply_override_(draft: RecipeDraft, override: str) -> None:
    """Write the value of 'path.to.key=value' into the draft, as if it stood in the file."""
    draft.overrides += 1
    place = Position(f"--set {override}", (1, draft.overrides))
    dotted, equals, text = override.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(path):
        draft.mistakes.append(
            Mistake(
                f"an override must be path.to.key=value, such as data.batch_size=32, got '{override}'", place
            )
        )
        return
    node = _compose(text)
    if isinstance(node, _Syntax):
        draft.mistakes.append(Mistake(node.text, place))
        return
    for known in [known for known in draft.places if known[: len(path)] == path]:
        del draft.places[known]
    section = draft.values
    for depth, key in enumerate(path[:-1], start=1):
        if not isinstance(section.get(key), dict):
            section[key] = {}
            draft.places.setdefault(path[:depth], place)
        section = section[key]
    draft.places[path] = place
    reading = _Reading(draft, lambda node: place, frozenset())
    section[path[-1]] = None if node is None else reading.value(node, path)


def normalise_sections_(values: dict[str, Any], spec: type[BaseModel]) -> None:
    """Make null an empty section (its keys are commented out), in place.

    Where a section may be null, false is null, and true and auto are the section with its defaults.
    """
    for key, info in spec.model_fields.items():
        section = nested_spec(info)
        if section is None or key not in values:
            continue
        optional = type(None) in get_args(info.annotation)
        if values[key] is None and not optional:
            values[key] = {}
        elif values[key] is False and optional:
            values[key] = None
        elif optional and (values[key] is True or values[key] == "auto"):
            values[key] = {}
        if isinstance(values[key], dict):
            normalise_sections_(values[key], section)


def dotted_key(path: Sequence[str]) -> str:
    """A key as people write it, such as cut.target."""
    return ".".join(path)


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(_LONGEST_TEXT + 1)
    except FileNotFoundError:
        names = [one.name for one in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = (
            f"did you mean {path.parent / near[0]}?" if near else "`sparsekit init` writes one to start from"
        )
        raise RecipeError(f"recipe {path} does not exist; {hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {path} must be text in UTF-8, got byte {error.start} that is not"
        ) from None
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class _Syntax:
    """Why a text is not YAML, and on which line of it (0 where that is unknown)."""

    text: str
    line: int


def _compose(text: str) -> yaml.Node | _Syntax | None:
    """The node tree of a YAML text; None for an empty one."""
    if len(text) > _LONGEST_TEXT:
        return _Syntax(f"not valid as a recipe: longer than {_LONGEST_TEXT:,} characters", 0)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _count(node, (), {})
        return node
    except _TooLargeError as error:
        return _Syntax(f"not valid as a recipe: {error}", 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if "\\t" in (error.problem or "") else ""
        return _Syntax(
            f"not valid YAML: {error.problem or error.context}{hint}", mark.line + 1 if mark else 0
        )
    except yaml.YAMLError as error:
        return _Syntax(f"not valid YAML: {' '.join(str(error).split())}", 0)
    except RecursionError:
        return _Syntax("not valid as a recipe: nested too deeply", 0)


class _TooLargeError(Exception):
    pass


def _count(
    node: yaml.Node, around: tuple[yaml.Node, ...], known: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """How many nodes there are from this one down, each as often as aliases repeat it, and how deep they are nested.

    Raises _TooLargeError where that is more than a recipe can need.
    """
    if any(node is one for one in around):  # it contains itself, which is told by its place
        return 1, 1
    if id(node) not in known:
        if len(around) > _MOST_LEVELS:
            raise _TooLargeError(f"nested more than {_MOST_LEVELS} deep")
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for one in inside for part in (one if isinstance(one, tuple) else (one,))]
        counted = [_count(part, (*around, node), known) for part in parts]
        known[id(node)] = (
            1 + sum(n for n, _ in counted),
            1 + max((height for _, height in counted), default=0),
        )
    n, height = known[id(node)]
    if n > _MOST_NODES:
        raise _TooLargeError(f"more than {_MOST_NODES:,} values, counted as often as aliases repeat them")
    if height > _MOST_LEVELS:
        raise _TooLargeError(f"nested more than {_MOST_LEVELS} deep")
    return n, height


def _node_word(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"'{str(node.value)[:60]}'"


@dataclass(frozen=True)
class _Reading:
    """Turns nodes into plain values, and notes in `draft` where each key stands and what is wrong with it."""

    draft: RecipeDraft
    place_of: Callable[[yaml.Node], Position]
    around: frozenset[int]

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        if id(node) in self.around:
            return self._refuse(node, path, "must not contain itself, got an alias of a value around it")
        inner = _Reading(self.draft, self.place_of, self.around | {id(node)})
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return inner._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [inner.value(item, path) for item in node.value]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.place_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                text = "a key must be a text, got a list or mapping"
                self.draft.mistakes.append(Mistake(text, place))
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                text = f"{dotted_key(here)} stands twice, first in {self.draft.places[here].label}"
                self.draft.mistakes.append(Mistake(text, place))
            self.draft.places[here] = place
            values[key] = self.value(value_node, here)
        return values

    def _scalar(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        readers: dict[str, Callable[[str], Any]] = {
            "str": str,
            "null": lambda _: None,
            "bool": lambda word: {"true": True, "false": False}[word.lower()],
            "int": lambda word: int(word, 0) if word[:2] in ("0o", "0x") else int(word),
            "float": lambda word: float(re.sub(r"\.(?=inf|nan)", "", word.lower())),
        }
        read = readers.get(node.tag.removeprefix(_TAG)) if isinstance(node, yaml.ScalarNode) else None
        try:
            if read is not None:
                return read(node.value)
        except (KeyError, ValueError):
            pass
        return self._refuse(node, path, f"has the YAML tag {node.tag}, which a recipe cannot hold")

    def _refuse(self, node: yaml.Node, path: tuple[str, ...], text: str) -> None:
        self.draft.refused.add(dotted_key(path))
        self.draft.mistakes.append(Mistake(f"{dotted_key(path)} {text}", self.place_of(node)))
