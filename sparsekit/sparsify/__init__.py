"""Make channels exactly zero while a model trains."""
