"""The cache folder of the package."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return a folder in the user's cache: below `XDG_CACHE_HOME`, or ~/.cache if that is not set. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen_vl_sft" / name
