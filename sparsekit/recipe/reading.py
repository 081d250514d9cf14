"""The recipe: what one run does, as typed, closed and frozen specs, and how a YAML file becomes one.

`load_recipe` reports every mistake at once, each on a line of its own that says what was expected, what was
found and where. YAML is read by the core rules of YAML 1.2: `1e-4` is a number, `no`, `on` and `off` are
texts, only `true` and `false` are booleans, and a key that stands twice is a mistake.

Relative paths in a recipe, like those on the command line, start at the directory the command is run from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from sparsekit.errors import RecipeError
from sparsekit.recipe.draft import Dumper, apply_override_, normalise_sections_, read_draft
from sparsekit.recipe.messages import validate_draft
from sparsekit.recipe.recipe import Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, then apply `overrides`, each 'path.to.key=value' in YAML; the last one wins.

    Raises:
        RecipeError: the file cannot be read, or holds mistakes; the message has one line for each of them.
    """
    draft = read_draft(path)
    for override in overrides:
        apply_override_(draft, override)
    normalise_sections_(draft.values, Recipe)
    recipe, found = validate_draft(draft)
    mistakes = sorted({*draft.mistakes, *found}, key=lambda mistake: (mistake.place.order, mistake.text))
    if mistakes or recipe is None:
        raise RecipeError("\n".join(f"{mistake.text} ({mistake.place.label})" for mistake in mistakes))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the recipe with every default written out; `load_recipe` reads it back as an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def default_output(path: Path) -> Path:
    """The run directory of the recipe at `path` where none is named: runs/<file name without suffix>."""
    return Path("runs") / path.stem
