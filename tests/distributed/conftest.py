"""Fixtures of models that train."""

from fixtures.trainers import ragged  # noqa: F401
