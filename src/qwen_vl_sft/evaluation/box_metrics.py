"""Scores of boxes and points in an answer, against those of the right answer. Both are in the data's coordinates.

Every score lies in [0, 1]. Of several boxes each counts for its best partner; one too many and one too few cost the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_vl_sft.data.boxes import BOX, data_scale, regions_in_answer
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.families.base import ChatFormat

MIN_IOU = 0.5
# Of the image's diagonal.
MAX_DISTANCE = 0.05


@dataclass(frozen=True)
class BoxTarget:
    """A box (x1, y1, x2, y2) or a point (x, y) of a right answer, and width and height of its image."""

    numbers: tuple[float, ...]
    scale: tuple[float, float]


def targets_of(conversation: Conversation) -> tuple[BoxTarget, ...]:
    """Return the boxes and points of the last message, after its thought.

    Raises `BadRow` for an image that cannot be read.
    """
    found: list[BoxTarget] = []
    for part in conversation.messages[-1]["content"]:
        if part["type"] == BOX:
            found.append(BoxTarget(tuple(part["numbers"]), data_scale(part, conversation.media)))
        elif ChatFormat.end_of_thought in part.get("text", ""):
            found = []
    return tuple(found)


def score_boxes(prediction: str, targets: Sequence[BoxTarget]) -> dict[str, float]:
    """Return the scores of an answer for the kinds of `targets`: `BOX_METRICS`, `POINT_METRICS`, or both."""
    found = [region.numbers for region in regions_in_answer(prediction)]
    boxes = [target.numbers for target in targets if len(target.numbers) == 4]
    points = [target for target in targets if len(target.numbers) == 2]
    scores: dict[str, float] = {}
    if boxes:
        given = [region for region in found if len(region) == 4]
        overlaps = _matched(boxes, given, iou)
        scores["accuracy_at_iou_50"] = _share([overlap >= MIN_IOU for overlap in overlaps], boxes, given)
        scores["mean_iou"] = _share(overlaps, boxes, given)
        scores["center_in_box"] = _share(_matched(boxes, found, _holds_center), boxes, found)
    if points:
        near = [region for region in found if len(region) == 2] or found
        distances = [1 - closeness for closeness in _matched(points, near, _closeness)]
        scores["accuracy_at_5_percent"] = _share([away <= MAX_DISTANCE for away in distances], points, near)
        scores["closeness"] = _share([1 - away for away in distances], points, near)
    return scores


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Return intersection over union of two boxes; 0 where one is empty."""
    sides = [min(first[at + 2], second[at + 2]) - max(first[at], second[at]) for at in (0, 1)]
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second)]
    if min(sides) <= 0 or min(areas) <= 0:
        return 0.0
    common = sides[0] * sides[1]
    return common / (sum(areas) - common)


BOX_METRICS = ("accuracy_at_iou_50", "mean_iou", "center_in_box")
POINT_METRICS = ("accuracy_at_5_percent", "closeness")
# Of each kind the one that is compared first.
BOX_HEADLINES = (BOX_METRICS[0], POINT_METRICS[0])
BOX_NOTES = {
    "accuracy_at_iou_50": "boxes that overlap the right one by half or more",
    "mean_iou": "intersection over union with the right box",
    "center_in_box": "center of the answer inside the right box",
    "accuracy_at_5_percent": "points at most 5% of the diagonal away",
    "closeness": "1 less the distance in diagonals of the image",
}


def _matched(wanted: Sequence[object], given: Sequence[object], score: Callable[..., float]) -> list[float]:
    """Pair each of `given` with at most one of `wanted`, the best pairs first; return the scores of the pairs."""
    pairs = sorted(
        ((score(one, other), a, b) for a, one in enumerate(wanted) for b, other in enumerate(given)), reverse=True
    )
    done: tuple[set[int], set[int]] = set(), set()
    scores = []
    for value, a, b in pairs:
        if a not in done[0] and b not in done[1]:
            done[0].add(a)
            done[1].add(b)
            scores.append(value)
    return scores


def _share(scores: Sequence[float], wanted: Sequence[object], given: Sequence[object]) -> float:
    return math.fsum(scores) / max(len(wanted), len(given))


def _center(region: Sequence[float]) -> tuple[float, float]:
    return (region[0] + region[-2]) / 2, (region[1] + region[-1]) / 2


def _holds_center(box: Sequence[float], region: Sequence[float]) -> float:
    x, y = _center(region)
    return float(box[0] <= x <= box[2] and box[1] <= y <= box[3])


def _closeness(target: BoxTarget, region: Sequence[float]) -> float:
    """Return 1 less the distance in diagonals of the image, at least 0."""
    (x, y), (width, height) = _center(region), target.scale
    distance = math.dist(target.numbers, (x, y)) / math.hypot(width, height)
    return max(0.0, 1 - distance)
