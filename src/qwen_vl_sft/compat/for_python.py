"""Changes to Python's own behaviour."""

from __future__ import annotations

import os
import sys
import time

_SETTLE_SECONDS = 0.02
_FIXED_IN = (3, 11, 10)


def settle_before_forks() -> None:
    """Wait a moment before each fork of this process, so that its other threads come to rest.

    Until Python 3.11.10 the child hangs, and training with it, if another thread is just entering or leaving Python when
    it is forked: `PyOS_AfterFork_Child` takes HEAD_LOCK, the lock over the list of threads, which that thread holds,
    before it makes the lock anew. gloo's thread enters Python at the end of a collective. Seen once in some hundred
    starts.
    """
    if sys.version_info < _FIXED_IN:
        os.register_at_fork(before=lambda: time.sleep(_SETTLE_SECONDS))
