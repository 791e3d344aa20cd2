"""One file per engine: how it is installed, started, and what it is told about a model."""
