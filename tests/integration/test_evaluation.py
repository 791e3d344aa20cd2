"""Arms on the same rows: any number of processes, killed and resumed, gives the same rows; wrong requests write nothing."""

import hashlib
import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fixtures.evaluation import SYSTEM_MESSAGE, plan, read_rows, write_charts, write_run
from fixtures.messages import conversation_row, png, write_messages
from fixtures.processes import PROCESS_TIMEOUT, Popen, launcher, run_process
from fixtures.repository import REPOSITORY
from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.config.reading import build
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats import FORMATS
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.answer_files import AnswerFiles, deal
from qwen_vl_sft.evaluation.evaluate import collect, count_truncated, evaluate
from qwen_vl_sft.evaluation.options import EvaluateOptions, EvaluationPlan
from qwen_vl_sft.evaluation.own_engine import OwnEngine
from qwen_vl_sft.evaluation.prediction_files import score_predictions
from qwen_vl_sft.evaluation.report import write_report
from qwen_vl_sft.evaluation.scoring import (
    Question,
    describe_cut,
    describe_engine,
    format_summary,
    score_row,
    summarise,
    write_results,
)
from qwen_vl_sft.evaluation.task import Task, describe_task, prepare, read_question
from qwen_vl_sft.inference.generation import ROWS_OF_A_UNIT, GeneratedAnswer, plan_units
from qwen_vl_sft.inference.models import attach_adapter, load_arm
from qwen_vl_sft.inference.source import TunedModel, find_tuned, read_source
from qwen_vl_sft.modeling.kept_features import kept_features, unrounded_features
from qwen_vl_sft.serving import evaluating
from qwen_vl_sft.serving.base import Served
from qwen_vl_sft.serving.evaluating import EngineAnswerer
from qwen_vl_sft.serving.registry import ENGINES
from qwen_vl_sft.tiny import MODEL_DIR
from qwen_vl_sft.tools.kill_and_resume import kill_family
from qwen_vl_sft.training import precompute_features

FILES = {"rows.jsonl", "summary.json", "settings.json", "parts"}


# Answers on disk: no model


def fake_answer(place):
    """An answer that depends on the row."""
    digest = hashlib.sha256(repr(place).encode()).hexdigest()
    return GeneratedAnswer(digest[:2], ended=digest[2] < "8")


def run_processes(files, units, processes, stop_after=None):
    """Every process answers its share, or only its first `stop_after` rows; nobody reads after the first has written."""
    done = files.read().get("base", {})
    for rank in range(processes):
        files.repair(rank)
        rows = [place for unit in deal(units, done, rank, processes) for place in unit]
        for place in rows[:stop_after]:
            files.append(rank, "base", {place: fake_answer(place)})


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=3),
    st.integers(1, 5),
    st.randoms(),
)
def test_neither_processes_nor_kills_nor_order_change_a_score(measured, killed_runs, processes, rng):
    lengths = [length for length, _ in measured]
    units = plan_units(lengths, [image for _, image in measured])
    questions = [
        Question(place, "?", [f"{place % 7:02x}"], ("human", "machine")[place % 2]) for place in range(len(lengths))
    ]
    alone = {place: fake_answer(place) for place in range(len(lengths))}
    expected = collect(questions, {"base": alone}, ["base"])
    with tempfile.TemporaryDirectory() as folder:
        files = AnswerFiles(Path(folder))
        for former_processes, stop_after in killed_runs:
            run_processes(files, units, former_processes, stop_after)
            victim = Path(folder) / "parts" / f"rank-{rng.randrange(former_processes):05d}.jsonl"
            content = victim.read_bytes()
            victim.write_bytes(content[: rng.randrange(len(content) + 1)])
        run_processes(files, units, processes)
        lines = [line for path in Path(folder).glob("parts/*") for line in path.read_text().splitlines() if line]
        whole = [json.loads(line)["row_id"] for line in lines if line.endswith("}")]
        assert sorted(whole) == list(range(len(lengths))), "a row twice, or lost"
        answers = files.read()
        rows = collect(rng.sample(questions, len(questions)), answers, ["base"])
    assert rows == expected
    assert count_truncated(rows, answers, ["base"]) == count_truncated(expected, {"base": alone}, ["base"])
    assert summarise(rng.sample(rows, len(rows)), ["base"]) == summarise(expected, ["base"])


def test_shares_are_balanced():
    units = plan_units(list(range(100)), [number // 4 for number in range(100)])
    shares = [deal(units, [], rank, 3) for rank in range(3)]
    assert sorted(place for share in shares for unit in share for place in unit) == list(range(100))
    costs = [sum(sum(unit) for unit in share) for share in shares]
    assert max(costs) < 1.2 * min(costs)
    left = [deal(units, range(90), rank, 2) for rank in range(2)]
    assert sorted(place for share in left for unit in share for place in unit) == list(range(90, 100))


def test_rows_on_the_same_images_are_one_unit():
    many = ROWS_OF_A_UNIT + 2
    units = plan_units([3, 9, 3, 7, 1, 8], ["a", "b", "a", (), (), "a"])
    assert units == [[1], [5, 0, 2], [3], [4]]
    assert [len(unit) for unit in plan_units([1] * many, ["a"] * many)] == [ROWS_OF_A_UNIT, 2]
    assert plan_units([], []) == []


def test_missing_answers_are_never_scored():
    with pytest.raises(AssertionError, match="no answer to rows"):
        collect([Question(3, "?", ["x"], None)], {"base": {}}, ["base"])


def test_table_fits_a_terminal():
    arms = ["base", "prompted", "tuned"]
    scored = score_row(Question(0, "?", ["1"], None), dict.fromkeys(arms, "1"))
    splits = ("human", "machine", "a part with a long name", "z")
    rows = [scored | {"human_or_machine": splits[number % 4]} for number in range(30_000)]
    lines = format_summary(summarise(rows, arms)).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("all (30,000)" in line for line in lines)
    assert any("100.0 [100.0, 100.0]" in line for line in lines)


def test_every_figure_has_its_rows_and_split():
    rows = [
        score_row(Question(number, "?", ["1"], "human" if number else None), {"a": "1", "b": "2"})
        for number in range(5)
    ]
    summary = summarise(rows, ["a", "b"])
    assert summary["scores"]["a"]["all"]["relaxed_accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "rows": 5}
    assert summary["scores"]["a"]["human"]["exact_match"]["rows"] == 4
    compared = {(entry["split"], entry["metric"]): entry for entry in summary["comparisons"]}
    assert compared["all", "exact_match"]["first_wins"] == 5
    assert compared["human", "exact_match"]["p_value"] == pytest.approx(2 / 16)


# Rows as questions


def test_every_entry_of_the_label_list_is_accepted():
    raw = {"row_id": 4, "label": ["63", "26"], "human_or_machine": 1}
    asked = Conversation([{"role": "user", "content": [{"type": "text", "text": "Which?"}]}], [])
    assert read_question(raw, asked, FORMATS["chartqa"]) == Question(4, "Which?", ["63", "26"], "machine")
    for label in ("63", 63, [63.0, None]):
        assert read_question(raw | {"label": label, "human_or_machine": 0}, asked, FORMATS["chartqa"]).answers == ["63"]


def test_the_last_assistant_turn_is_the_gold_answer():
    def turn(role, *parts):
        return {
            "role": role,
            "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
        }

    images = [ImageFile(b"1", None), ImageFile(b"2", None)]
    turns = [
        turn("user", None, "one?"),
        turn("assistant", "1"),
        turn("user", "two?"),
        turn("assistant", "2"),
        turn("user", None, "three?"),
    ]
    cut = Conversation(turns, images).up_to_last_answer()
    assert cut.messages == turns[:4]
    assert cut.media == images[:1]
    assert read_question({"row_id": 0}, cut, FORMATS["messages"]) == Question(0, "two?", ["2"], None)


# Predictions of another program


def predictions(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    return path


def test_predictions_are_scored_by_the_same_metrics(tmp_path):
    entries = [
        {"prediction": "95", "answer": "100", "human_or_machine": 0},
        {"prediction": "b", "label": ["a", "B"], "human_or_machine": 1},
        {"prediction": 3, "label": 3.0, "split": "machine"},
    ]
    lines = predictions(tmp_path, "\n".join(map(json.dumps, entries)) + "\n")
    rows, summary = score_predictions(lines)
    assert summary["scores"]["predictions"]["all"]["relaxed_accuracy"]["mean"] == 1
    assert summary["scores"]["predictions"]["machine"]["exact_match"] == {
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
        "rows": 2,
    }
    listed = predictions(tmp_path, "\ufeff" + json.dumps(entries))
    assert score_predictions(listed)[0] == rows


def test_half_a_character_is_written_as_json_writes_it(tmp_path):
    rows, summary = score_predictions(predictions(tmp_path, r'{"prediction": "é \ud83d", "answer": "1"}'))
    write_results(tmp_path, rows, summary)
    assert r"é \ud83d" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert read_rows(tmp_path) == rows


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prediction": "1"}', "line 1: has neither answer nor label"),
        ('{"prediction": "1", "answer": "1"}\n{"answer": "1"}', "line 2: has no prediction"),
        ('{"prediction": null, "answer": "1"}', "has a prediction that is neither text nor a number: None"),
        ('{"prediction": "1", "answer": "1", "label": "2"}', "both answer and label"),
        ('{"prediction": "1", "answer": []}', "empty list"),
        ('{"prediction": "1", "answer": "1", "split": "all"}', "name for all rows"),
        ('{"prediction": ', "line 1: is not JSON"),
        ("[1]", "entry 0: is a int"),
        ("", "holds no rows"),
    ],
)
def test_bad_predictions_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        score_predictions(predictions(tmp_path, text))


# Requests


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    return write_run(root, write_charts(root / "data"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run is missing: name a run folder, or give --model_name_or_path and --dataset_name"),
        (["--run", "nowhere"], "nowhere does not exist"),
        (["--run", "{run}", "--arms", "base,tunned"], "unknown arm 'tunned'; did you mean tuned"),
        (["--run", "{run}", "--resume", "--overwrite"], "exclude each other"),
        (["--model_name_or_path", "x", "--dataset_name", "y", "--arms", "tuned"], "tuned needs a run"),
        (["--run", "{run}", "--dtype", "int8"], "dtype: 'int8' is not one of bfloat16, float16, float32"),
        (["--run", "{run}", "--load_in_4bit", "--load_in_8bit"], "both on"),
        (["--run", "{run}/..", "--arms", "base"], "holds no recipe.yaml"),
        (["--predictions", "x.jsonl", "--arms", "base"], "without a model; leave out --arms"),
        (
            ["--predictions", "x", "--split", "val", "--max_samples", "3", "--batch_size", "4", "--use_cpu"],
            "leave out --split, --max_samples, --batch_size, --use_cpu",
        ),
    ],
)
def test_requests_that_cannot_be_meant(run, arguments, message):
    with pytest.raises(UserError, match=message):
        plan(*(argument.replace("{run}", str(run)) for argument in arguments))


def test_an_unfinished_run_names_its_checkpoint(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (tmp_path / "checkpoint-20").mkdir()
    with pytest.raises(UserError, match=r"training did not finish.*--run .*checkpoint-20"):
        plan("--run", tmp_path)
    assert plan("--run", tmp_path, "--arms", "base").tuned.is_adapter is False


def test_a_checkpoint_takes_recipe_and_processor_of_its_run(run, tmp_path, monkeypatch):
    for name in (
        "recipe.yaml",
        "system_message.txt",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (tmp_path / name).write_text((run / name).read_text())
    (tmp_path / "chat_template.jinja").write_text((run / "chat_template.jinja").read_text())
    checkpoint = tmp_path / "checkpoint-20"
    checkpoint.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (checkpoint / name).write_bytes((run / name).read_bytes())
    task = prepare(plan("--run", checkpoint, "--max_samples", 2))
    assert (task.arms, task.system_message) == (("base", "prompted", "tuned"), SYSTEM_MESSAGE)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/best").symlink_to(checkpoint)
    assert find_tuned(tmp_path / "elsewhere/best", needed=True).home.samefile(tmp_path)
    monkeypatch.chdir(checkpoint)
    assert find_tuned(Path(), needed=True).home.samefile(tmp_path)


def test_an_unknown_split_writes_nothing(run, tmp_path):
    with pytest.raises(UserError, match="split tset"):
        evaluate(plan("--run", run, "--split", "tset", "--output_dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(FILES))
def test_results_are_not_written_over(run, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"--resume.*--overwrite.*another folder"):
        plan("--run", run, "--output_dir", tmp_path)
    for way_out in ("--resume", "--overwrite"):
        plan("--run", run, "--output_dir", tmp_path, way_out)


@pytest.mark.parametrize("way_out", ["--resume", "--overwrite"])
@pytest.mark.parametrize(("name", "content"), [("settings.json", "[1]"), ("summary.json", '{"rows": 3}')])
def test_files_of_others_are_not_written_over(run, tmp_path, name, content, way_out):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"holds a {name} that no evaluation wrote; name another folder"):
        plan("--run", run, "--output_dir", tmp_path, way_out)


@pytest.mark.parametrize("way_out", [[], ["--resume"], ["--overwrite"]])
def test_a_folder_of_something_else_is_refused(run, tmp_path, way_out):
    (tmp_path / ".DS_Store").touch()
    plan("--run", run, "--output_dir", tmp_path, *way_out)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds files that no evaluation wrote \(thesis.tex\); name another folder"):
        plan("--run", run, "--output_dir", tmp_path, *way_out)


def test_a_model_is_asked_with_its_own_system_message(run, tmp_path):
    asked = ["--model_name_or_path", tmp_path, "--dataset_name", "x", "--output_dir", tmp_path / "new"]
    assert plan(*asked).system_message is None
    (tmp_path / "system_message.txt").write_text("As trained.")
    assert plan(*asked).system_message == "As trained."
    assert plan(*asked, "--system_message", "").system_message == ""


def test_a_place_that_cannot_be_written_is_told(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir: .*file/out cannot be written: Not a directory"):
        evaluate(plan("--run", run, "--max_samples", 1, "--output_dir", tmp_path / "file/out"))
    rows, summary = score_predictions(predictions(tmp_path, '{"prediction": "1", "answer": "1"}'))
    for write in (write_results, write_report):
        with pytest.raises(UserError, match=r"--output_dir: .*file cannot be written: \w+"):
            write(tmp_path / "file", rows, summary)
    files = AnswerFiles(tmp_path)
    (tmp_path / "settings.json").mkdir()
    for write in (files.clear, lambda: files.write_settings({})):
        with pytest.raises(
            UserError, match=r"--output_dir: .* cannot be written: .*; free space and continue with --resume"
        ):
            write()


def test_a_system_message_that_is_not_utf_8_is_told(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (tmp_path / "system_message.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"system_message\.txt is not UTF-8 text"):
        plan("--run", tmp_path, "--arms", "base")
    with pytest.raises(UserError, match="--system_message is not UTF-8 text"):
        read_source(run, {"system_message": "caf\udce9"}, False)


def test_a_run_without_system_message_has_no_prompted_arm(run, tmp_path):
    asked = ["--run", run, "--system_message", "", "--max_samples", 1, "--output_dir", tmp_path]
    assert prepare(plan(*asked)).arms == ("base", "tuned")
    with pytest.raises(UserError, match="it would repeat base"):
        prepare(plan(*asked, "--arms", "prompted"))


def test_capped_rows_are_spread_over_the_split(run):
    questions = prepare(plan("--run", run, "--max_samples", 30)).questions
    assert [question.row_id for question in questions[:3]] == [0, 10, 20]
    assert questions[-1].row_id == 290


def test_the_adapter_of_another_trainer_answers_as_the_run_that_it_is_from(run, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    weights = load_file(run / "adapter_model.safetensors")
    renamed = {name.replace("model.language_model.layers", "model.layers"): value for name, value in weights.items()}
    assert not set(weights) & set(renamed)
    save_file(renamed, theirs / "adapter_model.safetensors")
    config = json.loads((run / "adapter_config.json").read_text())
    targets = r"^(model(?=\.).*\.(q_proj|v_proj))$"
    config |= {"target_modules": targets, "base_model_name_or_path": str(run.parent / "model")}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    asked = ("--max_samples", 4, "--max_new_tokens", 4, "--dtype", "float32", "--arms", "base,tuned", "--use_cpu")
    rows = []
    for name, folder in (("ours", run), ("theirs", theirs)):
        where = ("--dataset_name", run.parent / "data", "--system_message", SYSTEM_MESSAGE)
        evaluate(plan("--run", folder, *where, "--output_dir", tmp_path / f"{name}-scores", *asked))
        rows.append(read_rows(tmp_path / f"{name}-scores"))
    assert rows[0] == rows[1]
    assert any(row["arms"]["base"] != row["arms"]["tuned"] for row in rows[0])
    with pytest.raises(UserError, match="dataset_name is not set"):
        evaluate(plan("--run", theirs, "--output_dir", tmp_path / "unasked"))


def test_a_truncated_adapter_is_told(run, tmp_path):
    whole = (run / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read: .*; copy it again"):
        attach_adapter(None, tmp_path)


def test_an_adapter_of_another_model_is_refused(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text((run / "adapter_config.json").read_text())
    weights = load_file(run / "adapter_model.safetensors")
    renamed = {name.replace("language_model", "text_model"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    ready = plan("--run", run)
    model = load_arm(ready, "base", None, context())
    with pytest.raises(UserError, match="have no counterpart"):
        attach_adapter(model, tmp_path)


def context():
    from qwen_vl_sft.distributed.context import DistributedContext

    return DistributedContext("single", 1, 0, 0, on_cpu=True)


# With the model

ASKED = ("--max_samples", "60", "--max_new_tokens", "16", "--batch_size", "4")


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory):
    """The evaluation by one process that nothing disturbs, and its summary."""
    from accelerate import PartialState

    folder = tmp_path_factory.mktemp("reference") / "out"
    summary = evaluate(plan("--run", run, "--output_dir", folder, *ASKED))
    PartialState._reset_state()
    return folder, summary


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Six rows: the image of the second cannot be decoded, the fourth's header cannot be read either."""
    rows = [conversation_row(f"<image>Which color is number {number}?", "red") for number in range(6)]
    rows[1]["images"], rows[3]["images"] = ["images/half.png"], ["images/none.png"]
    folder = write_messages(tmp_path_factory.mktemp("broken"), rows)
    (folder / "images/half.png").write_bytes(png()[:60])
    (folder / "images/none.png").write_bytes(b"no image")
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    return folder


def on_broken(data, *arguments):
    return ("--dataset_name", str(data), "--dataset_format", "messages", "--arms", "base,tuned", *arguments)


def test_rows_that_cannot_be_read_are_left_out_and_counted_by_any_number_of_processes(run, broken, tmp_path):
    from accelerate import PartialState

    skipping = on_broken(broken, "--bad_rows", "skip")
    started = start_two_processes(run, tmp_path / "two", *skipping, "--batch_size", "2")
    alone = evaluate(plan("--run", run, "--output_dir", tmp_path / "one", *ASKED, *skipping, "--batch_size", 2))
    PartialState._reset_state()
    output, _ = started.communicate(timeout=PROCESS_TIMEOUT)
    assert started.returncode == 0, output
    assert "4 rows (skipped 2 that could not be read)" in output
    assert re.search(r"skipped: .*row 1 image .*half\.png cannot be decoded", output)
    both = json.loads((tmp_path / "two/summary.json").read_text())
    for summary in (alone, both):
        assert (summary["rows"], summary["skipped_rows"]) == (4, 2)
        assert summary["scores"]["tuned"]["all"]["exact_match"]["rows"] == 4
    assert [row["row_id"] for row in read_rows(tmp_path / "one")] == [0, 2, 4, 5]
    assert (tmp_path / "two/rows.jsonl").read_bytes() == (tmp_path / "one/rows.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [(1, r"row 0 image .*half\.png cannot be decoded"), (3, r"row 0 image .*none\.png cannot be read")],
)
def test_a_row_that_cannot_be_read_is_named_with_the_way_out(row, message, run, broken, tmp_path):
    asked = ("--run", run, "--output_dir", tmp_path, "--split", f"test[{row}:{row + 1}]", "--max_new_tokens", 2)
    with pytest.raises(UserError, match=message + r".*; fix it, or .*--bad_rows skip"):
        evaluate(plan(*asked, *on_broken(broken)))
    with pytest.raises(UserError, match="none of "):
        evaluate(plan(*asked, *on_broken(broken, "--bad_rows", "skip", "--overwrite")))


def test_results_of_one_process(run, reference):
    folder, summary = reference
    rows = read_rows(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert [row["row_id"] for row in rows] == [5 * number for number in range(60)]
    assert {row["human_or_machine"] for row in rows} == {"human", "machine"}
    for row in rows:
        for answered in row["arms"].values():
            assert answered == {
                "answer": answered["answer"],
                **score_row(Question(0, "", row["answers"], None), {"x": answered["answer"]})["arms"]["x"],
            }
    for one, other in (("base", "prompted"), ("prompted", "tuned")):
        assert any(row["arms"][one] != row["arms"][other] for row in rows), f"{one} and {other} answer alike"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["precision"] == {"scored": "float32", "trained": "float32", "scored_as_trained": True}
    assert summary["settings"]["system_message"] == SYSTEM_MESSAGE
    assert summary["environment"]["versions"]["transformers"]


def test_features_that_training_kept_are_read_instead_of_images(tmp_path, monkeypatch):
    from accelerate import PartialState

    run = write_run(tmp_path, write_charts(tmp_path / "data"), cache_image_features="float32", packing=True)
    recipe = run / "recipe.yaml"
    kept = yaml.safe_load(recipe.read_text()) | {"image_features_dir": str(tmp_path / "features"), "bf16": False}
    recipe.write_text(yaml.safe_dump(kept))
    asked = ["--run", run, "--max_samples", "6", "--max_new_tokens", "4", "--arms", "base,tuned"]
    decoded, decode = set(), ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda file: decoded.add(file.content_hash) or decode(file))

    def answers(folder, *more):
        decoded.clear()
        evaluate(plan(*asked, *more, "--output_dir", tmp_path / folder))
        PartialState._reset_state()
        return [row["arms"] for row in read_rows(tmp_path / folder)]

    expected = answers("without")
    shown = prepare(plan(*asked, "--output_dir", tmp_path / "none"))
    assert decoded == {name for names in shown.images for name in names}
    planned = plan(*asked, "--output_dir", tmp_path / "none")
    cache, _ = kept_features(planned.recipe, shown.processor.image_processor)
    model, encoder = load_arm(planned, "base", None, context()), Encoder(shown.processor)
    *known, unknown = {
        file.content_hash: file for place in range(6) for file in shown.conversation(place).media
    }.values()
    for file in known:
        image = encoder.read_media(file)
        (features,) = precompute_features.run_tower(model.model, [image], model.device)
        cache.write(file.content_hash, features, image.grid)
    assert answers("with") == expected
    assert decoded == {unknown.content_hash}
    # Other pixels, and another precision, are other features; those of fewer bits are for training alone.
    answers("smaller", "--max_pixels", "6272")
    assert len(decoded) == len(known) + 1
    recipe.write_text(yaml.safe_dump(kept | {"cache_image_features": "int8"}))
    assert unrounded_features(plan(*asked, "--output_dir", tmp_path / "none").recipe, None) is None


@pytest.fixture
def fake_engine(monkeypatch):
    """An engine that repeats the question, with " with it" behind it where it has the adapter."""
    worker = str(REPOSITORY / "tests/fixtures/fake_engine.py")
    monkeypatch.setitem(ENGINES, "fake", replace(ENGINES["vllm"], name="fake", title="Fake", worker=worker))
    monkeypatch.setattr("qwen_vl_sft.serving.evaluating.python_of", lambda engine: Path(sys.executable))


def test_another_engine_answers_and_a_sample_is_compared(run, fake_engine, tmp_path):
    asked = ["--run", run, "--engine", "fake", "--max_samples", "40", "--max_new_tokens", "3", "--output_dir", tmp_path]
    summary = evaluate(plan(*asked), report=True, answering=EngineAnswerer("fake"))
    for row in read_rows(tmp_path):
        words = " ".join(row["question"].split()[:3])
        assert {arm: answered["answer"] for arm, answered in row["arms"].items()} == {
            "base": words, "prompted": words, "tuned": f"{words} with it",
        }  # fmt: skip
    told = summary["engine"]
    assert (told["title"], told["versions"]) == ("Fake", {"pytest": pytest.__version__})
    assert {arm: (found["rows"], found["same"]) for arm, found in told["compared"].items()} == dict.fromkeys(
        ("base", "prompted", "tuned"), (32, 0)
    )
    assert len(told["compared"]["base"]["others"]) == 20
    compared = "base 0 of 32, prompted 0 of 32, tuned 0 of 32"
    line = f"Fake {pytest.__version__} answered; of a sample this package's engine answers alike: {compared}"
    assert describe_engine(summary) == line
    assert f"<dt>Engine</dt><dd>{html.escape(line)}</dd>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert describe_engine({}) is None
    with pytest.raises(UserError, match="begun with other settings"):
        evaluate(plan(*asked[:2], *asked[4:], "--resume"))
    again = evaluate(plan(*asked, "--resume"), answering=EngineAnswerer("fake"))
    assert again["scores"] == summary["scores"]
    assert not again["speed"], "nothing is answered twice"


def test_answers_of_this_package_agree_with_themselves(run, fake_engine, tmp_path, monkeypatch):
    def own(process, task, prompts, rows, with_adapter, most):
        return dict(of_arm["tuned" if with_adapter else "prompted" if prompts.encoder.system_message else "base"])

    asked = plan("--run", run, "--engine", "fake", "--max_samples", "5", "--output_dir", tmp_path)
    of_arm = dict(evaluating._own_answers(asked, prepare(asked), ["base", "prompted", "tuned"]))
    monkeypatch.setattr(evaluating, "_ask", own)
    found = evaluate(asked, answering=EngineAnswerer("fake"))["engine"]["compared"]
    assert [(arm["rows"], arm["same"], arm["others"]) for arm in found.values()] == [(5, 5, [])] * 3


def test_what_another_engine_cannot_do_is_told(run, fake_engine, tmp_path, monkeypatch):
    refused = {
        ("--load_in_4bit", "true"): "--load_in_4bit: --engine fake answers with 16-bit weights; leave it out",
        ("--batch_size", "4"): "--batch_size: --engine fake chooses it itself",
    }
    for arguments, told in refused.items():
        with pytest.raises(UserError, match=told):
            plan("--run", run, "--engine", "fake", *arguments)
    assert not plan("--run", run, "--engine", "fake", "--output_dir", tmp_path).recipe.model.load_in_4bit
    with pytest.raises(UserError, match="--engine: 'vlm' is none of vllm"):
        EngineAnswerer("vlm")
    monkeypatch.setattr(evaluating, "_served", lambda *_: Served(tmp_path, "float32", tmp_path, {"use_dora": True}))
    with pytest.raises(UserError, match=r"Fake does not answer: vLLM does not yet support DoRA.*merge\.py"):
        evaluate(plan("--run", run, "--engine", "fake", "--output_dir", tmp_path), answering=EngineAnswerer("fake"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"start evaluate\.py without a launcher"):
        EngineAnswerer("fake")


def start_two_processes(run, folder, *arguments):
    command = [
        sys.executable,
        *launcher("cpu"),
        "scripts/evaluate.py",
        "--run",
        str(run),
        "--output_dir",
        str(folder),
        *ASKED,
        *arguments,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_killed_and_resumed_give_the_rows_of_one(run, reference, tmp_path):
    folder = tmp_path / "out"
    killed = start_two_processes(run, folder)
    deadline = time.monotonic() + PROCESS_TIMEOUT
    while sum(path.stat().st_size for path in folder.glob("parts/*")) < 500:
        assert time.monotonic() < deadline, "nothing was answered in time"
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    kill_family(killed.pid)
    killed.communicate()
    assert not (folder / "summary.json").exists(), "it was killed too late to prove anything"
    with open(folder / "parts" / "rank-00001.jsonl", "a") as file:
        file.write('{"arm": "base", "row_')
    survived = AnswerFiles(folder).read()["base"]

    resumed = start_two_processes(run, folder, "--resume")
    output, _ = resumed.communicate(timeout=PROCESS_TIMEOUT)
    assert resumed.returncode == 0, output
    assert (folder / "rows.jsonl").read_bytes() == (reference[0] / "rows.jsonl").read_bytes()
    written = [json.loads(line) for path in folder.glob("parts/*") for line in path.read_text().splitlines()]
    assert len(written) == 3 * 60
    assert len({(entry["arm"], entry["row_id"]) for entry in written}) == 3 * 60
    kept = {entry["row_id"]: entry["answer"] for entry in written if entry["arm"] == "base"}
    assert {row_id: answer.text for row_id, answer in survived.items()}.items() <= kept.items()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["scores"], summary["cut_answers"]) == (reference[1]["scores"], reference[1]["cut_answers"])


def test_resume_under_other_settings_is_refused(run, reference):
    folder = reference[0]
    before = (folder / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"begun with other settings .*max_new_tokens: 16, now 8"):
        evaluate(plan("--run", run, "--output_dir", folder, *ASKED, "--max_new_tokens", "8", "--resume"))
    assert (folder / "rows.jsonl").read_bytes() == before


def test_an_arm_can_be_added_and_nothing_is_answered_again(run, tmp_path, monkeypatch):
    asked = ("--run", run, "--output_dir", tmp_path, "--max_samples", 4, "--max_new_tokens", 2)
    evaluate(plan(*asked, "--arms", "base"))
    summary = evaluate(plan(*asked, "--arms", "tuned", "--resume"))
    assert list(summary["scores"]) == ["base", "tuned"]
    monkeypatch.setattr("qwen_vl_sft.evaluation.own_engine.load_arm", lambda *_: pytest.fail("a model was loaded"))
    assert evaluate(plan(*asked, "--arms", "base", "--resume"))["scores"] == summary["scores"]


def test_another_precision_is_named(run, tmp_path):
    asked = ("--run", run, "--output_dir", tmp_path, "--max_samples", 2, "--max_new_tokens", 2, "--arms", "tuned")
    summary = evaluate(plan(*asked, "--load_in_4bit", "--dtype", "bfloat16"))
    assert summary["precision"] == {
        "scored": "4-bit nf4 weights, double quantization, computed in bfloat16",
        "trained": "float32",
        "scored_as_trained": False,
    }


def test_a_run_that_trained_the_whole_model(run, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(run.parent / "model")
    with torch.no_grad():
        model.model.language_model.norm.weight.add_(torch.linspace(-2, 2, 128))
    model.save_pretrained(tmp_path / "run")
    for path in run.iterdir():
        if path.is_file() and not path.name.startswith("adapter"):
            (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    asked = ("--run", tmp_path / "run", "--max_samples", 8, "--max_new_tokens", 4)
    evaluate(plan(*asked, "--arms", "prompted,tuned"))
    arms = [row["arms"] for row in read_rows(tmp_path / "run" / "evaluation")]
    assert all(set(answers) == {"prompted", "tuned"} for answers in arms)
    assert any(answers["prompted"] != answers["tuned"] for answers in arms)


@pytest.mark.parametrize(("is_adapter", "beside_tuned"), [(False, []), (True, ["base"])])
def test_the_base_is_let_go_before_a_whole_tuned_model_is_loaded(tmp_path, monkeypatch, is_adapter, beside_tuned):
    class Model:
        def __init__(self):
            self.itself = self  # hooks of a real model point back at it

    held, alive = {}, {}

    def load(_, arm, model, __):
        alive[arm] = [name for name, reference in held.items() if reference() is not None]
        if arm == "prompted":
            return model
        loaded = Model()
        held[arm] = weakref.ref(loaded)
        return loaded

    def answer(_, model, *__):
        assert isinstance(model, Model)
        yield [(0, GeneratedAnswer("1", ended=True))]

    monkeypatch.setattr("qwen_vl_sft.evaluation.own_engine.load_arm", load)
    monkeypatch.setattr("qwen_vl_sft.evaluation.own_engine._answers", answer)
    monkeypatch.setattr("qwen_vl_sft.evaluation.own_engine.make_encoder", lambda *_: None)
    arms, files = ("base", "prompted", "tuned"), AnswerFiles(tmp_path)
    ready = EvaluationPlan(
        build({}), None, TunedModel(tmp_path, tmp_path, is_adapter), "", parse(EvaluateOptions, []), tmp_path
    )
    files.repair(rank=0)
    OwnEngine().answer_all(
        ready, Task(None, [Question(0, "?", ["1"], None)], [[0]], arms, "", None, ""), arms, {}, files, context()
    )
    assert alive == {"base": [], "prompted": ["base"], "tuned": beside_tuned}


@pytest.mark.parametrize(
    ("where", "rows", "told"),
    [
        ("load_arm", 1, r"--arms: .* the model of base; .*--load_in_4bit .*CUDA out of memory"),
        ("Engine", 8, r"--batch_size: the GPU's memory .*--max_pixels .*CUDA out of memory"),
    ],
)
def test_too_little_memory_names_the_way_out(where, rows, told, run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"qwen_vl_sft.evaluation.own_engine.{where}", fail)
    with pytest.raises(UserError, match=told):
        evaluate(plan("--run", run, "--output_dir", tmp_path, "--arms", "base", "--max_samples", rows))


def test_answers_that_were_cut_are_counted_and_told(run, tmp_path, monkeypatch, capsys):
    asked = ("--run", run, "--output_dir", tmp_path, "--arms", "base", "--max_samples", 3, "--max_new_tokens", 1)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, asked)])
    runpy.run_path(str(REPOSITORY / "scripts" / "evaluate.py"), run_name="__main__")
    assert json.loads((tmp_path / "summary.json").read_text())["cut_answers"] == {"base": 3}
    assert "answers cut at 1 tokens: base 3 of 3; raise --max_new_tokens" in capsys.readouterr().out
    assert "at 1 tokens: base 3 of 3" in (tmp_path / "report.html").read_text()


def test_what_was_cut_is_a_line_only_where_there_is_something():
    summary = {
        "rows": 2000,
        "settings": {"max_new_tokens": 64},
        "cut_answers": {"base": 1100, "prompted": 0, "tuned": 2},
    }
    assert describe_cut(summary) == "at 64 tokens: base 1,100, tuned 2 of 2,000"
    assert describe_cut(summary | {"cut_answers": {"base": 0}}) is None
    assert describe_cut({"rows": 3}) is None


def test_the_most_tokens_are_those_of_the_run_unless_others_are_given(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(recipe | {"max_new_tokens": 7}))
    asked = ("--run", tmp_path / "run", "--output_dir", tmp_path / "out", "--max_samples", 1)
    for words, most in (((), 7), (("--max_new_tokens", 9), 9)):
        ready = plan(*asked, *words)
        assert describe_task(ready, prepare(ready))["max_new_tokens"] == most
    with pytest.raises(UserError, match="max_new_tokens: 0 is below 1"):
        plan(*asked, "--max_new_tokens", 0)


def script(*arguments):
    return run_process("scripts/evaluate.py", *arguments)


def test_script_scores_predictions_and_ends_with_two_on_user_errors(tmp_path):
    path = predictions(tmp_path, '{"prediction": "95", "answer": "100", "split": "human"}\n')
    done = script("--predictions", path, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "100.0 [100.0, 100.0]" in done.stdout
    assert read_rows(tmp_path / "out")[0]["arms"]["predictions"]["relaxed_accuracy"] == 1
    again = script("--predictions", path, "--output_dir", tmp_path / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: --output_dir: ")


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_evaluation_says_how_to_go_on(begun, run, tmp_path, monkeypatch):
    def interrupted(plan, report, answering):
        if begun:
            AnswerFiles(plan.output_dir).write_settings({"rows_digest": ""})
        raise KeyboardInterrupt

    def leave(code, message, show):
        told.append((code, message.strip(), show))
        raise SystemExit

    told = []
    monkeypatch.setattr("qwen_vl_sft.evaluation.evaluate.evaluate", interrupted)
    monkeypatch.setattr("qwen_vl_sft.errors.leave", leave)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", str(run), "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "scripts/evaluate.py"), run_name="__main__")
    assert told == [(130, f"interrupted; continue with --resume in {tmp_path}" if begun else "interrupted", True)]


@pytest.mark.skipif(not (MODEL_DIR / "config.json").exists(), reason="the embedded model is not built yet")
def test_the_embedded_model_reads_charts(tmp_path):
    asked = ["--model_name_or_path", "builtin:tiny-qwen2-vl", "--dataset_name", "builtin:tiny-charts"]
    done = script(*asked, "--max_samples", 100, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "summary.json").read_text())["scores"]
    assert set(scores) == {"base", "prompted"}
    assert scores["prompted"]["all"]["relaxed_accuracy"]["mean"] > 0.2
