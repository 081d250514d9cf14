"""Milliseconds: of files, of layers, of operators; and the search for a speed."""
