"""Latencies of files, layers and operators, and the search for a speed-up."""
