"""What a run found: as data, as a table, as a page."""
