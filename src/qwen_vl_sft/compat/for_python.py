"""Changes to Python's own behaviour."""

from __future__ import annotations

import functools
import os
import sys
import time
from importlib import metadata

from packaging.specifiers import SpecifierSet

from qwen_vl_sft.compat.registry import Patch

_SETTLE_SECONDS = 0.02
_FIXED_IN = (3, 11, 10)


@functools.cache
def settle_before_forks() -> None:
    """Wait a moment before each fork of this process, so that its other threads come to rest.

    Until Python 3.11.10 the child hangs, and training with it, if another thread is just entering or leaving Python when
    it is forked: `PyOS_AfterFork_Child` takes HEAD_LOCK, the lock over the list of threads, which that thread holds,
    before it makes the lock anew. gloo's thread enters Python at the end of a collective. Seen once in some hundred
    starts.
    """
    if sys.version_info < _FIXED_IN:
        os.register_at_fork(before=lambda: time.sleep(_SETTLE_SECONDS))


def _runs_on(version: str) -> bool:
    """Return whether this package still supports a version of Python."""
    return SpecifierSet(metadata.metadata("qwen_vl_sft")["Requires-Python"]).contains(version)


PATCHES = (
    Patch(
        name="settle_before_forks",
        package="python",
        broken="<3.11.10",
        without="A worker of a data loader hangs at its start, once in some hundred starts, and training with it.",
        applied_by="compat.for_python.settle_before_forks",
        links=("https://github.com/python/cpython/issues/112275",),
        still_needed=lambda: _runs_on("3.11.9"),
    ),
    Patch(
        name="report_without_garbage_collection",
        package="python",
        broken="<3.12",
        without="The watchdog hangs while it reads the frames of other threads.",
        applied_by="resilience.watchdog.Watchdog",
        links=("https://github.com/python/cpython/issues/106883",),
        still_needed=lambda: _runs_on("3.11.9"),
    ),
)
