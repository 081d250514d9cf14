"""Read a recipe from a YAML file, and write one as YAML."""

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

    YAML is read by the core rules of YAML 1.2: `1e-4` is a number, `no`, `on` and `off` are texts, and a key that
    stands twice is a mistake. Relative paths start at the working directory.

    Raises RecipeError if the file cannot be read or holds mistakes. The message has a line for each mistake: what was
    expected, what was found, and where.
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
    """The recipe as YAML, every default written out; `load_recipe` reads it back as an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def default_output(path: Path) -> Path:
    """The run directory of a recipe that names none: runs/<file name without suffix>."""
    return Path("runs") / path.stem
