"""Boxes from a row to packed batches, to answers and to scores, on the charts with boxes that come with the package."""

import json

import pytest
import torch

from fixtures.evaluation import plan, read_rows
from fixtures.messages import conversation_row, png
from fixtures.models import qwen2_vl
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES, PackedCollator
from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.data.boxes import place_boxes
from qwen_vl_sft.data.conversation import text_of
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.demo.examples import collect_examples
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation import evaluate as evaluation
from qwen_vl_sft.evaluation import own_engine
from qwen_vl_sft.families.qwen2_5_vl import FAMILY as QWEN25
from qwen_vl_sft.inference.generation import GeneratedAnswer
from qwen_vl_sft.training.generation_metrics import GenerationMetrics


def answers_of(rows, indices, encoder):
    """What a perfect model would write, in its own coordinates."""
    placed = [place_boxes(rows.conversation({"row": index}), encoder.boxes, encoder.processor) for index in indices]
    return [text_of(conversation.messages[-1]) for conversation in placed]


@pytest.mark.parametrize("share", [False, True])
def test_packed_batches_hold_the_boxes_of_single_rows(share, tiny_processor):
    encoder = Encoder(tiny_processor)
    data = scan(open_rows(str(tiny.BOXES_DIR), "val"), encoder)
    # The rows of a chart share it, and the images of two charts differ.
    assert len(set(data.lengths.prefix.tolist())) == 20 < len(data.rows)
    collator = PackedCollator(Collator(data.rows, encoder), Positions(qwen2_vl().config))
    (step,) = next(iter(StepPlan(data.lengths, GlobalBatch(8), 10_000, 1, 0, share_prefixes=share).steps(0)))
    learned = []
    for batch in collator(step)[MICRO_BATCHES]:
        labels = batch["shift_labels"][batch["shift_labels"] != -100]
        learned += tiny_processor.tokenizer.decode(labels).split("<|im_end|>")[:-1]
    chosen = [row for micro_batch in step for group in micro_batch for row in group]
    assert len(learned) == 8
    assert sorted(learned) == sorted(answers_of(data.rows, chosen, encoder))


@pytest.fixture
def without_model(monkeypatch):
    """Let an evaluation answer from a list, and load no model."""
    given = {}

    def answers(plan, model, prompts, share, memory):
        for place in (place for unit in share for place in unit):
            prompts.encode(place)
            yield [(place, GeneratedAnswer(given[model][place], True))]

    monkeypatch.setattr(own_engine, "load_arm", lambda plan, arm, model, context: arm)
    monkeypatch.setattr(own_engine, "_answers", answers)
    return given


MODEL = ["--model_name_or_path", str(tiny.MODEL_DIR), "--use_cpu", "--arms", "base"]


def test_an_evaluation_scores_in_the_coordinates_of_the_data(without_model, tiny_processor, tmp_path):
    rows, encoder = open_rows(str(tiny.BOXES_DIR), "val[:6]"), Encoder(tiny_processor)
    without_model["base"] = answers_of(rows, range(6), encoder)
    without_model["base"][5] = "I see no bar."
    asked = plan(*MODEL, "--dataset_name", tiny.BOXES_DIR, "--split", "val[:6]", "--output_dir", tmp_path / "scores")
    summary = evaluation.evaluate(asked, report=True)
    scores = summary["scores"]["base"]["all"]
    assert scores["accuracy_at_iou_50"]["mean"] == scores["center_in_box"]["mean"] == pytest.approx(5 / 6)
    # In thousandths a box of a chart of 112 pixels is known to a ninth of a pixel.
    assert 0.97 * 5 / 6 <= scores["mean_iou"]["mean"] <= 5 / 6
    kept = read_rows(tmp_path / "scores")
    assert [row["arms"]["base"]["answer"] for row in kept[:5]] == [row["answers"][0] for row in kept[:5]]
    boxes = [rows.dataset[index]["objects"]["bbox"][0] for index in range(6)]
    assert [json.loads(row["answers"][0]) for row in kept] == boxes
    assert "Accuracy at iou 50" in (tmp_path / "scores/report.html").read_text()


def test_boxes_in_texts_are_asked_and_scored_as_the_recipe_tells(without_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_bytes(png("red", (100, 200)))
    written = '{{"bbox_2d": [{}, {}, {}, {}]}}'
    good = [conversation_row("<image>Where?", written.format(*numbers), ("a.png",)) for numbers in ((0.1, 0.5, 1, 1),)]
    bad = conversation_row("<image>Where?", written.format(0.1, 0.5, 1, 2), ("a.png",))
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, bad]))
    asked = [*MODEL, "--dataset_name", data, "--box_coordinates", "norm1"]
    with pytest.raises(UserError, match=r"row 1 has the box \[0.1, 0.5, 1, 2\], which is not inside .*--bad_rows skip"):
        evaluation.evaluate(plan(*asked, "--output_dir", tmp_path / "refused"))
    # An answer in thousandths, as Qwen2-VL gives it.
    without_model["base"] = [written.format(100, 500, 1000, 1000)]
    summary = evaluation.evaluate(plan(*asked, "--bad_rows", "skip", "--output_dir", tmp_path / "scores"))
    assert summary["skipped_rows"] == 1
    assert summary["scores"]["base"]["all"]["mean_iou"]["mean"] == pytest.approx(1)
    assert read_rows(tmp_path / "scores")[0]["arms"]["base"]["answer"] == written.format(0.1, 0.5, 1, 1)


def test_a_model_in_training_is_scored_on_boxes_too(tiny_processor, monkeypatch):
    from accelerate import Accelerator

    encoder = Encoder(tiny_processor, chat=QWEN25.chat)
    rows = open_rows(str(tiny.BOXES_DIR), "val[:5]")
    right = answers_of(rows, range(5), encoder)

    def answers(metrics, model, accelerator):
        for place in range(5):
            metrics.prompts.encode(place)
            yield [(place, GeneratedAnswer(right[place] if place else "[0, 0, 1, 1]", True))]

    monkeypatch.setattr(GenerationMetrics, "_on_its_own", answers)
    metrics = GenerationMetrics(scan(rows, encoder), encoder, None, 2, 24)
    found = metrics.measure(torch.nn.Linear(1, 1), Accelerator(cpu=True), step=1)
    # Qwen2.5-VL writes pixels of the resized image, and these charts keep their size.
    assert found["accuracy_at_iou_50"] == found["exact_match"] == pytest.approx(4 / 5)
    assert 4 / 5 <= found["mean_iou"] < 4 / 5 + 0.01
    assert metrics.left_out == 0
    metrics.check_measures("mean_iou")
    with pytest.raises(
        UserError, match="metric_for_best_model: closeness is measured where right answers hold boxes or"
    ):
        metrics.check_measures("closeness")


def test_the_page_offers_no_rows_with_boxes(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red", (100, 200)))
    found = conversation_row("<image>Where is it?", '{"bbox_2d": [0.1, 0.5, 1, 1]}', ("a.png",))
    plain = conversation_row("<image>Which color?", "red", ("a.png",))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (found, plain)))
    source = plan(*MODEL, "--dataset_name", tmp_path, "--box_coordinates", "norm1", "--output_dir", tmp_path / "scores")
    examples = collect_examples(source, 3, tmp_path / "examples")
    assert [example.question for example in examples] == ["Which color?"]
