"""Fixtures of models that train."""

from fixtures.packed_rows import encoded, model  # noqa: F401
from fixtures.trainers import ragged  # noqa: F401
