"""Check a draft, and put its mistakes in words that a person can use."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sparsekit.recipe.consistency import Contradiction
from sparsekit.recipe.draft import Mistake, RecipeDraft, dotted_key
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import nested_spec

# In place of required keys that are missing or wrong, so that the rest of the recipe can be checked.
_STAND_IN: Mapping[str, Mapping[str, Any]] = {
    "model": {},
    "dense": {"epochs": 1},
    "sparsify": {"epochs": 1},
    "finetune": {"epochs": 1},
}


def validate_draft(draft: RecipeDraft) -> tuple[Recipe | None, list[Mistake]]:
    """The recipe, or every mistake in it."""
    try:
        return Recipe.model_validate_json(json.dumps(draft.values)), []
    except ValidationError as error:
        errors = error.errors()
    broken: dict[tuple[str, ...], str] = {}
    for one in errors:
        if one["type"] != "contradiction":
            path = _key_path(one["loc"])
            # Of a list that is too short pydantic says "missing" too, but deeper than at the key.
            broken.setdefault(path, one["type"] if len(path) == len(one["loc"]) else "type")
    told = draft.refused
    mistakes = [
        _mistake(draft, path, kind) for path, kind in broken.items() if not _touches([dotted_key(path)], told)
    ]
    if broken:
        # pydantic looks for contradictions only once each key is right by itself: try again without the wrong ones.
        try:
            Recipe.model_validate_json(json.dumps(_without(draft.values, set(broken))))
        except ValidationError as error:
            errors = error.errors()
    dotted = {dotted_key(path) for path in broken} | told
    for one in errors:
        if one["type"] == "contradiction":
            found: list[Contradiction] = one["ctx"]["found"]
            mistakes += [_place(draft, item) for item in found if not _touches(item.keys, dotted)]
    return None, mistakes


def _key_path(location: Sequence[str | int]) -> tuple[str, ...]:
    """The key of the recipe that a pydantic location lies in; a location goes deeper, into lists and unions."""
    path: list[str] = []
    spec: type[BaseModel] | None = Recipe
    for part in location:
        if spec is None:
            break
        path.append(str(part))
        info = spec.model_fields.get(str(part))
        spec = None if info is None else nested_spec(info)
    return tuple(path)


def _mistake(draft: RecipeDraft, path: tuple[str, ...], kind: str) -> Mistake:
    place, dotted = draft.place(path), dotted_key(path)
    if kind == "extra_forbidden":
        return Mistake(f"unknown key {dotted}; {_suggestion(path)}", place)
    info = _spec_at(path[:-1]).model_fields[path[-1]]
    if kind == "missing":
        return Mistake(f"{dotted} is required: {info.description}", place)
    got: Any = draft.values
    for key in path:
        got = got[key]
    return Mistake(f"{dotted} must be {_expected_of(info)}, got {_shown(got)}", place)


def _suggestion(path: tuple[str, ...]) -> str:
    """The nearest key of the section, else one of that name in another section, else all of the section."""
    *section, key = path
    siblings = list(_spec_at(tuple(section)).model_fields)
    near = difflib.get_close_matches(key.lower().replace("-", "_"), siblings, n=1)
    if near:
        return f"did you mean {dotted_key((*section, near[0]))}?"
    elsewhere = [dotted for dotted in all_keys(Recipe) if dotted.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"the keys of {dotted_key(section) or 'a recipe'} are {', '.join(siblings)}"


def all_keys(spec: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of a spec, sections and what is in them."""
    for key, info in spec.model_fields.items():
        yield prefix + key
        section = nested_spec(info)
        if section is not None:
            yield from all_keys(section, f"{prefix}{key}.")


def _spec_at(path: tuple[str, ...]) -> type[BaseModel]:
    spec: type[BaseModel] = Recipe
    for key in path:
        spec = nested_spec(spec.model_fields[key]) or spec
    return spec


def _expected_of(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "expected" in extra:
        return str(extra["expected"])
    return _expected(info.annotation, info.metadata)


def _expected(kind: Any, metadata: Sequence[Any]) -> str:
    """What a value of this type looks like, bounds included: 'an integer >= 1 or null'."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        extra = [
            one for item in inner[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        return _expected(inner[0], [*extra, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(one, metadata) for one in inner)
    if origin is Literal:
        return inner[0] if len(inner) == 1 else f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        count = "" if inner[1:] == (...,) else f"{len(inner)} values, "
        return f"a list of {count or 'values, '}each {_expected(inner[0], [])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys of {', '.join(kind.model_fields)}"
    if kind is str:
        return "a non-empty text" if any(getattr(one, "min_length", 0) for one in metadata) else "a text"
    words = {int: "an integer", float: "a number", bool: "true or false", Path: "a path", type(None): "null"}
    return words[kind] + (_bounds(metadata) if kind in (int, float) else "")


def _bounds(metadata: Sequence[Any]) -> str:
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    parts = [
        f"{sign} {getattr(one, key):g}"
        if isinstance(getattr(one, key), float)
        else f"{sign} {getattr(one, key)}"
        for one in metadata
        for key, sign in signs
        if getattr(one, key, None) is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _shown(value: Any) -> str:
    """A value as the user would write it, on one line and short."""
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _touches(keys: Sequence[str], broken: set[str]) -> bool:
    """Whether a broken key is one of `keys`, or around or inside one."""
    return any(
        f"{key}.".startswith(f"{bad}.") or f"{bad}.".startswith(f"{key}.") for key in keys for bad in broken
    )


def _without(values: Mapping[str, Any], broken: set[tuple[str, ...]]) -> dict[str, Any]:
    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: copy(inner, (*path, key)) for key, inner in value.items() if (*path, key) not in broken}

    kept = copy(dict(values), ())
    for section, stand_in in _STAND_IN.items():
        kept[section] = {**stand_in, **kept.get(section, {})}
    return dict(kept)


def _place(draft: RecipeDraft, contradiction: Contradiction) -> Mistake:
    paths = [tuple(key.split(".")) for key in contradiction.keys]
    written = [draft.places[path] for path in paths if path in draft.places]
    overridden = [place for place in written if place.order[0]]
    place = overridden[-1] if overridden else written[0] if written else draft.place(paths[0])
    return Mistake(contradiction.text, place)
