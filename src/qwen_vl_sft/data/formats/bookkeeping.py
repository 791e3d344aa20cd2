"""Columns of rows, and keys of their turns, that tell of a row without being a part of it."""

from __future__ import annotations

import functools
import re

_NAMES = """
    id idx index uuid uid guid key hash md5 sha256 row_id
    source sources src origin split subset partition fold dataset datasets dataset_name data_source
    task type category categories subcategory topic topics subject domain tag tags lang language locale
    license licence copyright author authors annotator user_name model model_name generator version
    date time timestamp created created_at create_time updated_at
    score scores rating ratings quality difficulty level length size width height num_tokens token_count
    note notes comment comments meta metadata info extra_info parallel_tool_calls
"""
_KNOWN = frozenset(_NAMES.split())
_PATTERNS = re.compile(
    r".+_(?:id|idx|index|hash|scores?|ratings?|source|count|date|time|type|category|language|license|version|tags?)"
    r"|(?:num|n)_.+|__index_level_\d+__|unnamed: ?\d+",
    re.IGNORECASE,
)
# Whether an answer is a good one, as trainers of preferences name it: a bad one would be learned.
_TELLS_GOOD_FROM_BAD = frozenset({"kto_tag"})


@functools.lru_cache(maxsize=4096)
def is_bookkeeping(name: str) -> bool:
    """Return whether a column, or a key of a turn, is known to mean nothing for training."""
    known = name.lower()
    return known in _KNOWN or (known not in _TELLS_GOOD_FROM_BAD and _PATTERNS.fullmatch(name) is not None)
