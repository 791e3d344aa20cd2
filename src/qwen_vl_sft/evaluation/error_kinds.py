"""Kinds of wrong answers, so that a person can look through one kind of mistake at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence

WITHIN, OTHER_NUMBER, CATEGORY, VERBOSE, EMPTY = "within_10", "other_number", "category", "verbose", "empty"
# In the order in which the page offers them.
KINDS = {
    WITHIN: "wrong number within 10%",
    OTHER_NUMBER: "other wrong number",
    CATEGORY: "wrong category",
    VERBOSE: "verbose",
    EMPTY: "empty",
}
NEAR = 0.1

# A number inside a text, but not the 3 of Q3 nor the last digits of 1.2.3.
_NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?(?!\w)|(?<![\w.])[+-]?\.\d+%?(?!\w)")
_CURRENCIES = "$€£¥"


def error_kind(answer: str, golds: Sequence[str]) -> str:
    """Return the kind of a wrong answer, a key of `KINDS`, against the nearest of several gold answers.

    An answer that holds the gold answer is `verbose`, also where it is a number with its unit. Where the gold answer is
    a number, the last number of the answer is held against it, `12%` both as 12 and as 0.12.
    """
    answer = _plain(answer)
    if not answer:
        return EMPTY
    kinds = {_kind(answer, _plain(gold)) for gold in golds}
    return next(kind for kind in (VERBOSE, WITHIN, OTHER_NUMBER, CATEGORY) if kind in kinds)


def _kind(answer: str, gold: str) -> str:
    # A sign or a decimal point makes another number, a hyphen another word.
    if gold and re.search(rf"(?<![\w+-])(?<!\d[.,]){re.escape(gold)}(?!\w)(?![.,]\d)", answer, re.IGNORECASE):
        return VERBOSE
    found = _NUMBER.findall(answer)
    if not found or not _NUMBER.fullmatch(gold.strip(_CURRENCIES)):
        return CATEGORY
    wanted = _readings(gold.strip(_CURRENCIES))
    change = min(_change(given, value) for given in _readings(found[-1]) for value in wanted)
    if change == 0 and found[-1] != answer:
        return VERBOSE  # the same number written otherwise, among words
    return WITHIN if change <= NEAR else OTHER_NUMBER


def _readings(number: str) -> list[float]:
    value = float(number.rstrip("%").replace(",", ""))
    return [value, value / 100] if number.endswith("%") else [value]


def _change(given: float, wanted: float) -> float:
    if given == wanted:
        return 0.0
    return abs(given - wanted) / abs(wanted) if wanted else float("inf")


def _plain(text: str) -> str:
    return text.strip().replace("\N{MINUS SIGN}", "-")
