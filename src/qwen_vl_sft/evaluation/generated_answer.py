"""An answer as a model gave it, with whether it came to its end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeneratedAnswer:
    """The text without structural tokens; an answer that did not end by itself was cut at `max_new_tokens` tokens."""

    text: str
    ended: bool
