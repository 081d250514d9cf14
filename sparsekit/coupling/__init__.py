"""Which channels go together: one traced forward pass, and a proof of what it showed."""
