"""Memory, time and disk of a run, worked out from its configuration: no weights, no GPU, and no training library."""
