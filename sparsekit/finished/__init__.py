"""A finished model and a few hundred images: what a speed would cost, and the model at that speed; no labels."""
