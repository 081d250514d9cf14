"""Change the weights that stay so that the outputs come back, without training."""
