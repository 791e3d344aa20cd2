"""One script per engine, run by the Python of the engine's own environment; they import nothing of this package."""
