"""Scripts that convert a model, run by the Python of their own environment; they import nothing of this package."""
