"""Measure this package, and make models for tests. Nothing that trains or evaluates imports it."""
