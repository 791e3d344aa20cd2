"""The base model: loaded, adapted, patched, and what it costs to compute."""
