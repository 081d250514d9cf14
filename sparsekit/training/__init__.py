"""Images, models and the training loop."""
