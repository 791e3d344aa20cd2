"""From rows to batches: their order, padded batches, and packed ones."""
