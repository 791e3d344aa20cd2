"""`max_run_time`: save a checkpoint and end the run before its time is up."""

from __future__ import annotations

import re
import time

import psutil

# Assumed time of a save until one is measured: a share of the limit, between these two numbers of seconds.
_UNKNOWN_SHARE, _UNKNOWN_LEAST, _UNKNOWN_MOST = 0.05, 2.0, 300.0
# A save or an evaluation may take longer than the longest so far by this factor.
_SLACK = 1.5
_CLOCK = re.compile(r"^(?:(?P<d>\d+)-)?(?:(?:(?P<h>\d+):)?(?P<m>\d+):)?(?P<s>\d+)$")
_UNITS = re.compile(r"^(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?$")


def parse_duration(text: str) -> int:
    """Return the seconds of `3h30m`, `HH:MM:SS`, `MM:SS`, `D-HH:MM:SS` (Slurm's) or plain seconds. Raises `ValueError`."""
    match = _CLOCK.match(text.strip()) or _UNITS.match(text.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"{text!r} is no time")
    parts = {unit: int(value or 0) for unit, value in match.groupdict().items()}
    return ((parts["d"] * 24 + parts["h"]) * 60 + parts["m"]) * 60 + parts["s"]


class Deadline:
    """Tells when to save, counted from the start of this process.

    Args:
        seconds: of the whole run; None for no limit.

    `step`, `save` and `evaluation` are the longest noted so far, in seconds.
    """

    def __init__(self, seconds: int | None) -> None:
        self.seconds = seconds
        self.step = 0.0
        self.evaluation = 0.0
        self.save: float | None = None
        self._ends = psutil.Process().create_time() + seconds if seconds is not None else float("inf")

    def note_step(self, seconds: float) -> None:
        """Note how long a step took, with the wait for its data."""
        self.step = max(self.step, seconds)

    def note_save(self, seconds: float | None) -> None:
        """Note how long the longest save took; None when there was none yet."""
        self.save = seconds

    def note_evaluation(self, seconds: float) -> None:
        """Note how long an evaluation took."""
        self.evaluation = max(self.evaluation, seconds)

    def is_due(self, evaluates: bool) -> bool:
        """Return whether another step, with the evaluation that is due now, would leave too little time to save after it."""
        if self.seconds is None:
            return False
        unknown = min(max(_UNKNOWN_SHARE * self.seconds, _UNKNOWN_LEAST), _UNKNOWN_MOST)
        save = unknown if self.save is None else _SLACK * self.save + 1
        # The agreement of a group on GPUs is read a step later.
        ahead = 2 * self.step + _SLACK * (self.evaluation if evaluates else 0.0)
        return time.time() + ahead + save >= self._ends
