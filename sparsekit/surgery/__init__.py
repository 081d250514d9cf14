"""Make a model smaller by a plan, and prove that the cut is right."""
