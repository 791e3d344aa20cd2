"""Resolve a run, and train it with TRL's trainer."""
