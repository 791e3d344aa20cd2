"""Scores of an answer, means with intervals over rows, and the paired comparison of two arms. Needs no model.

Every score lies in [0, 1]. `METRICS` gives them by name: the published ChartQA metric is the headline, because it is
what others report; the others stand beside it under names of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vl_sft.evaluation.box_metrics import (
    BOX_HEADLINES,
    BOX_METRICS,
    BOX_NOTES,
    POINT_METRICS,
    BoxTarget,
    score_boxes,
)

MAX_RELATIVE_CHANGE = 0.05
ANLS_THRESHOLD = 0.5
BOOTSTRAP_RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
# Resamples drawn at once, so that a metric with many distinct values needs little memory.
BOOTSTRAP_CHUNK = 500

_YEAR = re.compile(r"(1[5-9]|20)\d\d")
# A comma or a fixed-width space between groups of three digits; an ordinary space may stand between two numbers.
_SEPARATED = re.compile(r"[+-]?\d{1,3}(?P<separator>[,\u00a0\u2009\u202f])\d{3}((?P=separator)\d{3})*(\.\d+)?%?")


def relaxed_accuracy(prediction: str, target: str) -> float:
    """Score by ChartQA's relaxed accuracy (Masry et al. 2022, section 5.1), as pix2struct and lmms-eval compute it.

    Numbers within 5% of the target (`|prediction - target| / |target|`) are right; everything else must be equal in
    lower case. `5%` is the number 0.05. Years get the 5% too, and thousands separators make a text: the metric's own
    weak points, kept so that scores compare with published ones. Only the prediction is stripped.
    """
    prediction = prediction.strip()
    predicted, wanted = _to_number(prediction), _to_number(target)
    if predicted is not None and wanted:
        return float(abs(predicted - wanted) / abs(wanted) <= MAX_RELATIVE_CHANGE)
    return float(prediction.lower() == target.lower())


def normalised_relaxed_accuracy(prediction: str, target: str) -> float:
    """Score by relaxed accuracy without its known mistakes: years are exact, zero is a number, and notation does not count.

    A target year (1500 to 2099) must be met exactly. On both sides thousands separators and one trailing full stop
    are dropped, and surrounding whitespace. So it may be above the published one, or below it.
    """
    prediction, target = _normalise(prediction), _normalise(target)
    predicted, wanted = _to_number(prediction), _to_number(target)
    if predicted is not None and wanted is not None and (_YEAR.fullmatch(target) or wanted == 0):
        return float(predicted == wanted)
    return relaxed_accuracy(prediction, target)


def exact_match(prediction: str, target: str) -> float:
    """Score 1 for equal texts, case-sensitive, ignoring surrounding whitespace."""
    return float(prediction.strip() == target.strip())


def anls(prediction: str, target: str) -> float:
    """Score by normalised Levenshtein similarity in lower case, 0 below a half (Biten et al. 2019): for answers in sentences.

    Its mean over rows is ANLS.
    """
    prediction, target = prediction.strip().lower(), target.strip().lower()
    longest = max(len(prediction), len(target))
    if longest == 0:
        return 1.0
    distance = _edit_distance(prediction, target) / longest
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


METRICS: dict[str, Callable[[str, str], float]] = {
    "relaxed_accuracy": relaxed_accuracy,
    "normalised_relaxed_accuracy": normalised_relaxed_accuracy,
    "exact_match": exact_match,
    "anls": anls,
}
HEADLINE = "relaxed_accuracy"
# All that may be measured; the data decide which of the boxes and points are.
ALL_METRICS = (*BOX_METRICS, *POINT_METRICS, *METRICS)
NOTES = BOX_NOTES | {
    "relaxed_accuracy": "published ChartQA metric: numbers within 5%, years too",
    "normalised_relaxed_accuracy": "years exact, separators ignored: may be higher",
    "exact_match": "same text, case-sensitive",
    "anls": "similarity of texts, 0 below a half",
}


def score(prediction: str, targets: Sequence[str], boxes: Sequence[BoxTarget] = ()) -> dict[str, float]:
    """Return every metric of one prediction; the best of the accepted targets counts, for each metric on its own.

    Those of boxes and points are measured where the right answer has some.
    """
    assert not isinstance(targets, str)
    texts = {name: max(metric(prediction, target) for target in targets) for name, metric in METRICS.items()}
    return texts | score_boxes(prediction, boxes)


def measured_metrics(names: Collection[str]) -> list[str]:
    """Return those of `ALL_METRICS` among `names`, in their order; the headline first."""
    return sorted((name for name in ALL_METRICS if name in names), key=lambda name: name != headline(names))


def headline(names: Collection[str]) -> str:
    """Return the metric that is compared first: that of boxes or points where there is one among `names`."""
    return next((name for name in BOX_HEADLINES if name in names), HEADLINE)


def headline_in_log(logs: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the headline of an evaluation while training, in words, and its mean; None where nothing was answered."""
    metric = headline([name.removeprefix("eval_") for name in logs])
    return (metric.replace("_", " "), logs[f"eval_{metric}"]) if f"eval_{metric}" in logs else None


def headline_of(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the headline of scores over all rows, by metric: one that all rows have, beside others without boxes too."""
    rows = max(cell.get("rows", 0) for cell in cells.values())
    return headline([name for name, cell in cells.items() if cell.get("rows", 0) == rows])


@dataclass(frozen=True)
class Estimate:
    """A mean over `rows` rows and the 95% interval of it; all NaN when there is no row."""

    mean: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same rows.

    `first_wins` and `second_wins` count the rows where that arm scores higher. `difference` is the mean of second minus
    first. `p_value` is two-sided: how likely a split of the wins as uneven as this one is if neither arm is better.
    """

    rows: int
    first_wins: int
    second_wins: int
    difference: Estimate
    p_value: float


def estimate(scores: Sequence[float], resamples: int = BOOTSTRAP_RESAMPLES) -> Estimate:
    """Estimate the mean of N scores with its 95% percentile bootstrap interval, whatever their order.

    Rows are resampled as if independent, though several questions may share an image. When all scores are equal, the
    interval has no width, which says nothing about rows that were not seen.
    """
    if not len(scores):
        return Estimate(math.nan, math.nan, math.nan, 0)
    # A resample of rows is a multinomial draw over the distinct scores: few numbers, and no order to depend on.
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    rows = int(counts.sum())
    mean = math.fsum((values * counts).tolist()) / rows
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    means = []
    for start in range(0, resamples, BOOTSTRAP_CHUNK):
        size = min(BOOTSTRAP_CHUNK, resamples - start)
        means.append(generator.multinomial(rows, counts / rows, size=size) @ values / rows)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), rows)


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare the scores of two arms, N each, on the same rows in the same order."""
    assert len(first) == len(second)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    first_wins = sum(difference < 0 for difference in differences)
    second_wins = sum(difference > 0 for difference in differences)
    p_value = sign_test(first_wins, second_wins)
    return Comparison(len(differences), first_wins, second_wins, estimate(differences), p_value)


def sign_test(first_wins: int, second_wins: int) -> float:
    """Return the p-value of the exact two-sided sign test; for scores of 0 and 1 it is McNemar's exact test.

    `2 * P(X <= min(wins))` for X binomial over all wins with probability 1/2, at most 1. Integers keep it exact.
    """
    wins = first_wins + second_wins
    term, tail = 1, 0
    for count in range(min(first_wins, second_wins) + 1):
        tail += term
        term = term * (wins - count) // (count + 1)
    return min(1.0, 2 * tail / 2**wins)


def _to_number(text: str) -> float | None:
    """Return `float(text)`, or its hundredth when the text ends in `%`; None for everything else."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _normalise(text: str) -> str:
    """Drop surrounding whitespace, one trailing full stop, and the thousands separators of a number."""
    text = text.strip().removesuffix(".").rstrip()
    match = _SEPARATED.fullmatch(text)
    return text.replace(match["separator"], "") if match else text


def _edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance, by len(first) numpy operations on len(second) values."""
    letters = np.array([ord(letter) for letter in second], dtype=np.int64)
    columns = np.arange(len(second) + 1)
    previous = columns
    for number, letter in enumerate(first, start=1):
        current = np.empty_like(previous)
        current[0] = number
        current[1:] = np.minimum(previous[1:] + 1, previous[:-1] + (letters != ord(letter)))
        # An insertion costs one a place: current[j] = min over k <= j of current[k] + j - k.
        previous = np.minimum.accumulate(current - columns) + columns
    return int(previous[-1])
