"""Accuracy while training: the same answers and scores on every strategy, and no trace in the training."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from fixtures.messages import conversation_row
from fixtures.processes import launch, run_process
from qwen_vl_sft import tiny
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.evaluation.answer_files import deal
from qwen_vl_sft.evaluation.metrics import METRICS, score
from qwen_vl_sft.inference.engine.engine import answer_conversations
from qwen_vl_sft.modeling.base_model import freeze_vision_tower, load_model
from qwen_vl_sft.training.generation_metrics import ANSWERS_FOLDER, GenerationMetrics, share
from qwen_vl_sft.training.model_setup import keep_trained_weights_in_float32

MODEL = ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), dtype="float32")
KEYS = {
    "predict_with_generate": "true",
    "metric_for_best_model": "relaxed_accuracy",
    "greater_is_better": "true",
    "max_predict_samples": 7,
    "per_device_eval_batch_size": 2,
    "max_eval_samples": 20,
    "max_train_samples": 64,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_on_start": "true",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
}
ARGUMENTS = ["scripts/sft.py", "--recipe", "recipes/quickstart.yaml"]
ARGUMENTS += [word for key, value in KEYS.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def evaluation(tiny_processor):
    return scan(open_rows(str(tiny.DATA_DIR), "val"), Encoder(tiny_processor))


@pytest.mark.parametrize("context", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_processes_answer_every_batch_and_where_weights_are_split_as_many_each(count, context):
    batches = [[number] for number in range(count)]
    shares = [deal(batches, (), rank, context) for rank in range(context)]
    assert sorted(batch for part in shares for batch in part) == batches
    equal = [share(batches, rank, context) for rank in range(context)]
    assert {len(part) for part in equal} == {len(equal[0])}
    assert {tuple(batch) for part in equal for batch in part} == {tuple(batch) for batch in batches}


def test_the_scores_are_those_of_evaluation(evaluation, tiny_processor, tmp_path):
    from accelerate import Accelerator

    model, encoder = load_model(MODEL, on_cpu=True), Encoder(tiny_processor)
    metrics = GenerationMetrics(evaluation, encoder, 12, batch_size=5, max_new_tokens=24, output_dir=tmp_path)
    found = metrics.measure(model, Accelerator(cpu=True), step=3)
    chosen = [evaluation.rows.dataset[index] for index in metrics.sample]
    conversations = [evaluation.rows.conversation({"row": index}) for index in metrics.sample]
    answers = answer_conversations(model, encoder, conversations, 24, rows=1)
    scores = [score(answer, row["label"]) for answer, row in zip(answers, chosen, strict=True)]
    assert found == pytest.approx({name: sum(one[name] for one in scores) / 12 for name in METRICS})
    kept = [json.loads(line) for line in (tmp_path / ANSWERS_FOLDER / "step-000003.jsonl").read_text().splitlines()]
    assert [row["arms"]["tuned"]["answer"] for row in kept] == answers
    # ChartQA's two halves lie one after the other.
    assert {row["human_or_machine"] for row in kept} == {"human", "machine"}


def test_a_row_that_turns_bad_is_left_out_of_the_scores_or_named(tiny_processor, messages_folder):
    from accelerate import Accelerator

    shown = [conversation_row(), conversation_row("<image>Which color is it now?", "blue", images=("images/blue.png",))]
    rows = open_rows(str(messages_folder(shown)), "train")
    model, encoder = load_model(MODEL, on_cpu=True), Encoder(tiny_processor)
    metrics = [
        GenerationMetrics(scan(rows, encoder), encoder, None, 1, 4, skip_bad_rows=skip) for skip in (True, False)
    ]
    (rows.folder / "images/blue.png").write_bytes(b"gone bad")
    alone = GenerationMetrics(scan(rows.select([0]), encoder), encoder, None, 1, 4)
    expected = alone.measure(model, Accelerator(cpu=True), step=1)
    assert metrics[0].measure(model, Accelerator(cpu=True), step=1) == expected
    assert (metrics[0].left_out, alone.left_out) == (1, 0)
    with pytest.raises(BadRow, match=r"row 1 image .*blue\.png cannot be read"):
        metrics[1].measure(model, Accelerator(cpu=True), step=1)
    (rows.folder / "images/red.png").write_bytes(b"gone bad")
    with pytest.raises(BadRow, match="none of the 2 evaluation rows"):
        metrics[0].measure(model, Accelerator(cpu=True), step=2)


def test_each_image_is_decoded_once(tiny_processor, messages_folder, monkeypatch):
    from accelerate import Accelerator

    rows = open_rows(str(messages_folder([conversation_row(), conversation_row("<image>And now?")])), "train")
    encoder = Encoder(tiny_processor)
    metrics = GenerationMetrics(scan(rows, encoder), encoder, None, 2, 4, skip_bad_rows=True)
    decoded, decode = [], ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda file: decoded.append(file.path) or decode(file))
    metrics.measure(load_model(MODEL, on_cpu=True), Accelerator(cpu=True), step=1)
    assert decoded == [str(rows.folder / "images/red.png")]


def test_a_frozen_tower_sees_each_image_once_in_all_evaluations(evaluation, tiny_processor, monkeypatch):
    from accelerate import Accelerator

    model, encoder = load_model(MODEL, on_cpu=True), Encoder(tiny_processor)
    seen, compute = [], model.model.visual.forward
    monkeypatch.setattr(
        model.model.visual, "forward", lambda x, grid_thw, **more: seen.extend(grid_thw) or compute(x, grid_thw, **more)
    )
    metrics = GenerationMetrics(evaluation, encoder, 6, batch_size=2, max_new_tokens=3)
    counts = []
    for trains in (True, False):
        for parameter in model.model.visual.parameters():
            parameter.requires_grad_(trains)
        for _ in range(2):
            metrics.measure(model, Accelerator(cpu=True), step=1)
            counts.append(len(seen))
    assert counts == [counts[0], 2 * counts[0], 3 * counts[0], 3 * counts[0]]


def test_all_processes_poll_equally_often(evaluation, tiny_processor, monkeypatch):
    from accelerate import Accelerator

    model, polls = load_model(MODEL, on_cpu=True), []
    for rank in range(3):
        accelerator = Accelerator(cpu=True)
        monkeypatch.setattr(type(accelerator), "process_index", rank)
        monkeypatch.setattr(type(accelerator), "num_processes", 3)
        monkeypatch.setattr(accelerator, "reduce", lambda sums, **_: sums)
        metrics = GenerationMetrics(evaluation, Encoder(tiny_processor), 10, batch_size=2, max_new_tokens=2)
        count = []
        metrics.measure(model, accelerator, step=1, poll=lambda count=count: count.append(1))
        polls.append(len(count))
    assert polls == [1, 1, 1]


def test_weights_that_train_in_float32_beside_others_in_bfloat16_answer(evaluation, tiny_processor, monkeypatch):
    from accelerate import Accelerator

    model, accelerator = load_model(replace(MODEL, dtype="bfloat16"), on_cpu=True), Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "native_amp", True)  # as with `bf16: true`
    freeze_vision_tower(model)
    keep_trained_weights_in_float32(model)
    metrics = GenerationMetrics(evaluation, Encoder(tiny_processor), 3, batch_size=2, max_new_tokens=2)
    assert metrics.measure(model, accelerator, step=1).keys() == set(METRICS)
    assert not torch.is_autocast_enabled("cpu")


def test_training_is_the_same_with_and_without_it(evaluation, tiny_processor, tmp_path):
    from fixtures.trainers import make_trainer

    start, losses = load_model(MODEL, on_cpu=True), []
    rows = evaluation.rows.select(list(range(6)))
    for wanted in (False, True):
        arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "eval_on_start": True}
        answers = GenerationMetrics(evaluation, Encoder(tiny_processor), 3, 2, 8) if wanted else None
        model, folder = copy.deepcopy(start), tmp_path / str(wanted)
        trainer = make_trainer(model, rows, tiny_processor, folder, answers=answers, **arguments)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        measured = [entry["eval_relaxed_accuracy"] for entry in trainer.state.log_history if "eval_anls" in entry]
        assert len(measured) == (4 if wanted else 0)
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process: its folder."""
    folder = tmp_path_factory.mktemp("single") / "run"
    done = run_process(*ARGUMENTS, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "config", ["cpu", *(pytest.param(name, marks=pytest.mark.long) for name in ("zero2", "zero3", "fsdp2"))]
)
def test_every_strategy_gives_the_answers_and_scores_of_one_process(config, single, tmp_path):
    done = launch(config, *ARGUMENTS, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for step in (0, 1, 2):
        name = f"{ANSWERS_FOLDER}/step-{step:06d}.jsonl"
        assert (tmp_path / "run" / name).read_text() == (single / name).read_text()
    wanted, found = (
        [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        for folder in (single, tmp_path / "run")
    )
    for metric in METRICS:
        series = [[entry[f"eval_{metric}"] for entry in log if f"eval_{metric}" in entry] for log in (wanted, found)]
        assert len(series[0]) == 3
        assert series[1] == pytest.approx(series[0], abs=1e-9)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    best = next(entry for entry in found if "eval_anls" in entry and entry["step"] == 1)
    assert metrics["best_checkpoint"].endswith("checkpoint-1")  # an equal score later is no better one
    assert metrics["eval_relaxed_accuracy"] == best["eval_relaxed_accuracy"]
