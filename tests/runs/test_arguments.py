"""What follows from a recipe: the arguments of the calls that do its work."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsekit.recipe.reading import load_recipe
from sparsekit.runs.arguments import Arguments

FINISHED = Path(__file__).parents[2] / "recipes" / "finished_model.yaml"


@pytest.mark.parametrize(("overrides", "importance"), [((), "greedy"), (("cut.importance=lasso",), "lasso")])
def test_a_finished_model_is_ordered_greedily_or_as_asked(
    overrides: tuple[str, ...], importance: str
) -> None:
    options = Arguments.of(load_recipe(FINISHED, overrides)).finished
    assert options is not None
    assert options.importance == importance
