"""Answer with a base model or a run: load it, generate in batches or as a stream."""
