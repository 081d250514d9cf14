"""Make up for a cut without labels: what it loses, closed forms, and learning from the dense model."""
