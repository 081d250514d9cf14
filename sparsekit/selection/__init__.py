"""Which channels stay: their importance, their costs, and the choice under limits."""
