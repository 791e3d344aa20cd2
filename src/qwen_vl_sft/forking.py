"""Starting the workers of data loaders beside the threads of a process group."""

from __future__ import annotations

import os
import sys
import time

_SETTLE_SECONDS = 0.02


def settle_before_forks() -> None:
    """Let other threads come to rest before each fork of this process.

    Until Python 3.12 a child hangs for ever, and training with it, if another thread is just entering or leaving Python
    when it is forked: `PyOS_AfterFork_Child` takes the lock over the list of threads before it makes it new. gloo's
    thread does so at the end of a collective. Seen once in some hundred starts; can go when Python 3.11 does.
    """
    if sys.version_info < (3, 12):
        os.register_at_fork(before=lambda: time.sleep(_SETTLE_SECONDS))
