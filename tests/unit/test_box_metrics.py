"""Scores of boxes and points in answers, which of them are measured, and how they are told."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.box_metrics import BoxTarget, iou, score_boxes, targets_of
from qwen_vl_sft.evaluation.metrics import METRICS, headline_in_log, score
from qwen_vl_sft.evaluation.prediction_files import score_predictions
from qwen_vl_sft.evaluation.report import render
from qwen_vl_sft.evaluation.scoring import Question, format_summary, score_row, summarise

BOX, OTHER, POINT = (BoxTarget(numbers, (100, 100)) for numbers in ((0, 0, 10, 10), (50, 50, 60, 60), (30, 40)))


@pytest.mark.parametrize(
    ("answer", "targets", "scores"),
    [
        ("[0, 0, 10, 10]", [BOX], (1, 1, 1)),
        ("<|box_start|>(0,0),(10,10)<|box_end|>", [BOX], (1, 1, 1)),
        ("It is at [0, 0, 10, 5].", [BOX], (1, 0.5, 1)),
        ("[0, 0, 10, 4.9]", [BOX], (0, 0.49, 1)),
        ("[5, 0, 15, 10]", [BOX], (0, 1 / 3, 1)),
        ("[6, 0, 16, 10]", [BOX], (0, 4 / 16, 0)),
        ("no box", [BOX], (0, 0, 0)),
        ("[10, 10, 0, 0]", [BOX], (0, 0, 1)),
        ("[5, 5]", [BOX], (0, 0, 1)),
        ("[11, 5]", [BOX], (0, 0, 0)),
        # One too many, one too few, and another order.
        ("[0, 0, 10, 10], [50, 50, 60, 60]", [BOX], (0.5, 0.5, 0.5)),
        ("[0, 0, 10, 10]", [BOX, OTHER], (0.5, 0.5, 0.5)),
        ('[{"bbox_2d": [50, 50, 60, 60]}, {"bbox_2d": [0, 0, 10, 10]}]', [BOX, OTHER], (1, 1, 1)),
    ],
)
def test_boxes(answer, targets, scores):
    names = ("accuracy_at_iou_50", "mean_iou", "center_in_box")
    assert score_boxes(answer, targets) == pytest.approx(dict(zip(names, scores, strict=True)))


@pytest.mark.parametrize(
    ("answer", "right", "away"),
    [
        ("[30, 40]", 1, 0),
        ("(33, 44)", 1, 5 / math.hypot(100, 100)),
        ("[36, 48]", 0, 10 / math.hypot(100, 100)),
        ("[20, 30, 40, 50]", 1, 0),
        ('<points x1="30" y1="40">', 1, 0),
        ("somewhere", 0, 1),
    ],
)
def test_points(answer, right, away):
    assert score_boxes(answer, [POINT]) == pytest.approx({"accuracy_at_5_percent": right, "closeness": 1 - away})


sides = st.tuples(*[st.integers(0, 20)] * 4)


@given(sides, sides)
def test_the_iou_is_that_of_pixels(first, second):
    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    both, either = pixels(first) & pixels(second), pixels(first) | pixels(second)
    expected = len(both) / len(either) if pixels(first) and pixels(second) else 0
    assert iou(first, second) == iou(second, first) == pytest.approx(expected)


def test_boxes_of_a_thought_are_no_targets():
    thought = {"type": "box", "numbers": [1, 2, 3, 4], "coordinates": "norm1000", "text": "[1, 2, 3, 4]"}
    parts = [{"type": "text", "text": "<think>"}, thought, {"type": "text", "text": "</think>"}]
    conversation = Conversation([{"role": "assistant", "content": [*parts, thought | {"numbers": [5, 6]}]}], [])
    assert targets_of(conversation) == (BoxTarget((5, 6), (1000, 1000)),)


def scored(row_id, boxes, **answers):
    return score_row(Question(row_id, "Where?", ["[0, 0, 10, 10]"], None, tuple(boxes)), answers)


def test_the_data_choose_the_metrics_and_the_headline():
    assert set(score("a", ["b"])) == set(METRICS)
    rows = [scored(0, [BOX], base="", tuned="[0, 0, 10, 10]"), scored(1, [BOX], base="", tuned="[0, 0, 10, 6]")]
    summary = summarise(rows, ["base", "tuned"])
    cells = summary["scores"]["tuned"]["all"]
    assert list(cells)[:3] == ["accuracy_at_iou_50", "mean_iou", "center_in_box"]
    assert set(METRICS) < set(cells)
    assert cells["mean_iou"]["mean"] == pytest.approx(0.8)
    assert cells["mean_iou"]["low"] == pytest.approx(0.6)
    assert cells["accuracy_at_iou_50"]["mean"] == 1
    text = format_summary(summary)
    assert "arms on the same rows by accuracy_at_iou_50" in text
    assert max(map(len, text.splitlines())) <= 80
    page = render(rows, summary)
    assert page.index("Accuracy at iou 50") < page.index("Mean iou") < page.index("Relaxed accuracy")
    assert "Accuracy at iou 50 on the same rows" in page


def test_a_metric_is_measured_over_the_rows_that_have_it():
    rows = [scored(0, [BOX], base="[0, 0, 10, 10]"), scored(1, [], base="[0, 0, 10, 10]"), scored(2, [POINT], base="")]
    rows[1]["human_or_machine"] = "text"
    summary = summarise(rows, ["base"])
    counts = {metric: cell["rows"] for metric, cell in summary["scores"]["base"]["all"].items()}
    assert counts == {
        **dict.fromkeys(METRICS, 3),
        "accuracy_at_iou_50": 1,
        "mean_iou": 1,
        "center_in_box": 1,
        "accuracy_at_5_percent": 1,
        "closeness": 1,
    }
    assert set(summary["scores"]["base"]["text"]) == set(METRICS)
    # Not every row has boxes, so another metric is compared first.
    both = summarise([{**row, "arms": row["arms"] | {"tuned": row["arms"]["base"]}} for row in rows], ["base", "tuned"])
    assert "arms on the same rows by relaxed_accuracy" in format_summary(both)
    render(rows, summary)


def test_the_headline_of_a_log():
    assert headline_in_log({"eval_relaxed_accuracy": 0.5, "eval_loss": 1.0}) == ("relaxed accuracy", 0.5)
    boxes = {"eval_relaxed_accuracy": 0.0, "eval_accuracy_at_iou_50": 0.25, "eval_mean_iou": 0.3}
    assert headline_in_log(boxes) == ("accuracy at iou 50", 0.25)
    assert headline_in_log({"eval_loss": 1.0}) is None


def test_boxes_of_another_program_are_scored(tmp_path):
    entries = [
        {"prediction": "[0, 0, 10, 5]", "bbox": [[0, 0, 10, 10]]},
        {"prediction": "(0,0),(10,10)", "answer": "the bar", "bbox": [[0, 0, 10, 10]]},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    rows, summary = score_predictions(path)
    assert [row["answers"] for row in rows] == [["[0, 0, 10, 10]"], ["the bar"]]
    assert summary["scores"]["predictions"]["all"]["mean_iou"]["mean"] == pytest.approx(0.75)
    for bad in ([0, 0, 1, 1], [[1, 2]], [], "box", [[1, 2, 3, None]]):
        path.write_text(json.dumps({"prediction": "1", "bbox": bad}))
        with pytest.raises(UserError, match="has a bbox that is no list of boxes of four numbers"):
            score_predictions(path)
