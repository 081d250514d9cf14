"""The story of a recipe, from its first check to its report."""
