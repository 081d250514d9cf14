"""Which channels stay: importance, costs, and the choice under a limit."""
