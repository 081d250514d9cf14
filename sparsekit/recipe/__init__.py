"""The YAML file: its specs, how it is read, and what is said of its mistakes."""
