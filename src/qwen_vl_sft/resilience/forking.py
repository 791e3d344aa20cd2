"""Starting the workers of data loaders beside the threads of a process group."""

from __future__ import annotations

import os
import sys
import time

_SETTLE_SECONDS = 0.02
_MENDED_IN = (3, 11, 10)


def settle_before_forks() -> None:
    """Let other threads come to rest before each fork of this process.

    Until Python 3.11.10 a child hangs for ever, and training with it, if another thread is just entering or leaving
    Python when it is forked: `PyOS_AfterFork_Child` takes HEAD_LOCK, the lock over the list of threads, which that thread
    holds, before it makes it new (https://github.com/python/cpython/issues/112275). gloo's thread does so at the end of a
    collective. Seen once in some hundred starts; can go when those versions of Python do.
    """
    if sys.version_info < _MENDED_IN:
        os.register_at_fork(before=lambda: time.sleep(_SETTLE_SECONDS))
