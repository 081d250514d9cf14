"""Read a recipe from a YAML file, and write one as YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsekit.errors import RecipeError
from sparsekit.recipe.draft import Dumper, RecipeDraft, apply_override_, normalise_sections_, read_draft
from sparsekit.recipe.messages import all_keys, validate_draft
from sparsekit.recipe.recipe import Recipe

_FACTORY = ("model", "factory")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, then apply `overrides`, each 'path.to.key=value' in YAML; the last one wins.

    YAML is read by the core rules of YAML 1.2: `1e-4` is a number, `no`, `on` and `off` are texts, and a key that
    stands twice is a mistake. Relative paths start at the working directory.

    Raises RecipeError if the file cannot be read or holds mistakes. The message has a line for each mistake: what was
    expected, what was found, and where.
    """
    return _checked(_draft(path, overrides))


def load_run_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a run directory to build its model; such a directory may come from anywhere.

    So a function that it names as `model.factory` is refused unless an override names it: only a person may say what
    code runs. Raises RecipeError then, and as `load_recipe` does.
    """
    draft = _draft(run / "recipe.yaml", overrides)
    recipe = _checked(draft)
    factory, place = recipe.model.factory, draft.place(_FACTORY)
    by_override = place.order[0] > 0
    if factory is not None and not by_override:
        raise RecipeError(
            f"model.factory {factory} is code, and a run directory may come from anywhere, so its word is not enough; "
            f"if you trust that function, add --set model.factory={factory} ({place.label})"
        )
    return recipe


def placer(path: Path, overrides: Sequence[str] = ()) -> Callable[[str], str]:
    """A function that adds to each line of a message that begins with a key where that key was written.

    It is for problems that show once the recipe has been read: a recipe does not know where its keys were written.
    """
    draft = _draft(path, overrides)
    return lambda message: "\n".join(_with_place(line, draft) for line in message.splitlines())


def dump_recipe(recipe: Recipe, *, names_only: bool = False) -> str:
    """The recipe as YAML, every default written out; `load_recipe` reads it back as an equal recipe.

    `names_only`: of paths only the last part, as in files that are given away; they say who the person is.
    """
    values = recipe.model_dump(mode="json")
    if names_only:
        values = _without_folders(recipe.model_dump(), values)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def _without_folders(values: Any, plain: Any) -> Any:
    """The plain values, with the last part of each that is a path."""
    if isinstance(values, Path):
        return values.name or values.resolve().name
    if isinstance(values, dict):
        return {key: _without_folders(values[key], value) for key, value in plain.items()}
    return plain


def default_output(path: Path) -> Path:
    """The run directory of a recipe that names none: runs/<file name without suffix>."""
    return Path("runs") / path.stem


def _draft(path: Path, overrides: Sequence[str]) -> RecipeDraft:
    draft = read_draft(path)
    for override in overrides:
        apply_override_(draft, override)
    normalise_sections_(draft.values, Recipe)
    return draft


def _checked(draft: RecipeDraft) -> Recipe:
    """The recipe of a draft. Raises RecipeError with all its mistakes."""
    recipe, found = validate_draft(draft)
    mistakes = sorted({*draft.mistakes, *found}, key=lambda mistake: (mistake.place.order, mistake.text))
    if mistakes or recipe is None:
        raise RecipeError("\n".join(f"{mistake.text} ({mistake.place.label})" for mistake in mistakes))
    return recipe


def _with_place(line: str, draft: RecipeDraft) -> str:
    key = re.match(
        r"[a-z_]+(\.[a-z_]+)+(?=[: ])", line
    )  # dotted: a sentence may begin with "model" or "data"
    if key is None or key.group() not in all_keys(Recipe):
        return line
    return f"{line} ({draft.place(tuple(key.group().split('.'))).label})"
