"""Where the package keeps what later runs read again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of the user's own cache: below `XDG_CACHE_HOME`, or ~/.cache where that is not set. It may not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen_vl_sft" / name
