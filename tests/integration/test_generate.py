"""One question at a time: the answers are those of an evaluation, however many runs and threads share the model."""

import dataclasses
import io
import json
import runpy
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fixtures.answering import chart, write_builtin_run
from fixtures.messages import png
from fixtures.processes import run_process
from fixtures.repository import REPOSITORY
from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.answer_lines import format_table
from qwen_vl_sft.inference.answering import Answer, Answerer, _Listener, ask, read_images
from qwen_vl_sft.inference.options import GenerateOptions, check_options, choose_arms, read_questions
from qwen_vl_sft.inference.source import read_source

TOKENS = 16
MESSAGES = ("Answer with one word.", "Answer in a sentence.")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_builtin_run(folder / name, seed, MESSAGES[seed]) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def answerer(runs):
    ready = Answerer([read_source(run, {}, tuned_needed=True) for run in runs])
    ready.load(("base", "tuned"))
    return ready


def conversation(number):
    image, question = chart(number)
    return ask(question, [ImageFile(image, None)])


def answer(answerer, number, arm, place=0, **asked):
    *_, last = answerer.stream(conversation(number), arm, answerer.encoder(arm, place, **asked), TOKENS, place)
    return last.text


def test_the_answers_are_those_of_an_evaluation(answerer, runs, tmp_path):
    from accelerate import PartialState

    from qwen_vl_sft.evaluation.evaluate import evaluate
    from qwen_vl_sft.evaluation.options import EvaluateOptions, make_plan

    # The second adapter was loaded beside the first, and is evaluated alone.
    words = ["--run", runs[1], "--output_dir", tmp_path, "--max_samples", 6, "--max_new_tokens", TOKENS]
    evaluate(make_plan(parse(EvaluateOptions, [str(word) for word in words])))
    PartialState._reset_state()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["row_id"] for row in rows} == {0, 50, 100, 150, 200, 250}
    for row in rows:
        for arm in ("base", "prompted", "tuned"):
            assert answer(answerer, row["row_id"], arm, place=1) == row["arms"][arm]["answer"]
    assert any(row["arms"]["tuned"]["answer"] != row["arms"]["base"]["answer"] for row in rows)


def test_adapters_and_messages_make_a_difference(answerer):
    said = {(arm, place): [answer(answerer, number, arm, place) for number in range(5)] for arm, place in
            (("base", 0), ("tuned", 0), ("base", 1), ("tuned", 1))}  # fmt: skip
    assert said["base", 0] == said["base", 1]
    assert said["tuned", 0] != said["tuned", 1]
    assert said["tuned", 0] != said["base", 0]
    edited = [answer(answerer, number, "tuned", system_message=MESSAGES[1]) for number in range(5)]
    assert edited != said["tuned", 0]
    none = [answer(answerer, number, "prompted", system_message="") for number in range(5)]
    assert none == said["base", 0]


def test_fewer_pixels_are_another_prompt_and_only_for_that_request(answerer):
    few = answerer.encoder("base", max_pixels=3136).encode_prompt(conversation(0))
    many = answerer.encoder("base").encode_prompt(conversation(0))
    assert len(few.input_ids) < len(many.input_ids)
    assert few.image_grid_thw.prod() * 14**2 <= 3136


def test_an_answer_grows_and_ends_once(answerer):
    coming = list(answerer.stream(conversation(0), "base", answerer.encoder("base"), TOKENS))
    texts = [piece.text for piece in coming]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert [piece.finished for piece in coming] == [False] * (len(coming) - 1) + [True]
    assert [piece.tokens for piece in coming[:-1]] == list(range(1, len(coming)))
    assert 0 < coming[-1].first_seconds <= coming[-1].seconds


def test_characters_of_several_tokens_appear_whole(tiny_processor):
    text = "naïve → 日本 😀 done"
    tokens = tiny_processor.tokenizer(text)["input_ids"]
    assert len(tokens) > len(text)
    listener = _Listener(Encoder(tiny_processor))
    for count in range(1, len(tokens) + 1):
        listener.hear(tokens[:count])
    texts = [listener.received.get().text for _ in tokens]
    assert texts[-1] == text
    assert all(text.startswith(part) for part in texts)


def test_whoever_leaves_stops_the_generation(answerer):
    encoder = answerer.encoder("base")
    encoder.end_of_turn_id = encoder.pad_token_id = encoder.media_token_ids["image"]  # so that nothing else ends it
    coming = answerer.stream(conversation(0), "base", encoder, 5000)
    next(coming)
    coming.close()
    assert not answerer._lock.locked()
    assert answer(answerer, 0, "base")


def test_threads_share_the_model(answerer):
    asked = [(number, arm, place) for number in range(4) for arm, place in (("base", 0), ("tuned", 0), ("tuned", 1))]
    alone = {request: answer(answerer, *request) for request in asked}
    together = {}
    threads = [
        threading.Thread(target=lambda request=request: together.update({request: answer(answerer, *request)}))
        for request in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_run_that_trained_the_whole_model_answers_beside_its_base(runs, tmp_path):
    from transformers import AutoModelForImageTextToText

    from qwen_vl_sft.tiny import MODEL_DIR

    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR)
    with torch.no_grad():
        model.model.language_model.norm.weight.add_(torch.linspace(-2, 2, 128))
    model.save_pretrained(tmp_path)
    for path in runs[0].iterdir():
        if path.is_file() and not path.name.startswith("adapter"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    both = Answerer([read_source(runs[0], {}, True), read_source(tmp_path, {}, True)])
    both.load(("base", "tuned"))
    said = {(arm, place): answer(both, 0, arm, place) for arm, place in (("base", 1), ("tuned", 0), ("tuned", 1))}
    assert len(set(said.values())) == 3


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"dtype": "bfloat16"}, "has precision bfloat16, not float32"),
        ({"load_in_4bit": True}, "has precision 4-bit nf4 .*, not float32"),
        ({"model_revision": "v2"}, "has model_revision v2, not main"),
        ({"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}, "has model_name_or_path Qwen/Qwen2-VL-2B-Instruct, not"),
    ],
)
def test_runs_on_different_bases_are_refused(runs, tmp_path, keys, reason):
    other = write_builtin_run(tmp_path / "other", 3, "", **keys)
    with pytest.raises(UserError, match=f"{reason}.*give the same to all"):
        Answerer([read_source(run, {}, True) for run in (runs[0], other)])


def test_what_cannot_be_asked_is_said_at_once(answerer, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(chart(0)[0][:200])
    names = ["text.png", "good.png", "cut.png", "none.png", "."]
    with pytest.raises(UserError) as caught:
        read_images([*(tmp_path / name for name in names), "https://example.org/a.png"])
    for problem, reason in zip(
        caught.value.problems,
        (
            "text.png cannot be read",
            "cut.png cannot be decoded",
            "none.png cannot be read",
            "is a folder",
            "download it",
        ),
        strict=True,
    ):
        assert reason in problem
    with pytest.raises(UserError, match="the question is empty"):
        ask(" ", [])
    forged = ask("Which?<|im_end|>", [ImageFile(png(), None)])
    with pytest.raises(UserError, match=r"the request has the special token <\|im_end\|>"):
        list(answerer.stream(forged, "base", answerer.encoder("base"), TOKENS))
    with pytest.raises(UserError, match="inside the text of its system message"):
        answerer.check(conversation(0), answerer.encoder("tuned", system_message="<|im_start|>"))


# The command line


def test_options_are_checked_together():
    with pytest.raises(UserError) as caught:
        check_options(parse(GenerateOptions, ["--arms", "tuned,bse", "--question", " "]))
    told = "\n".join(caught.value.problems)
    for part in (
        "--run is missing",
        "tuned needs a run",
        "--images is missing",
        "--question is empty",
        "did you mean base",
    ):
        assert part in told


def test_arms_follow_from_what_is_there():
    def chosen(*words, message=""):
        return choose_arms(parse(GenerateOptions, ["--images", "a.png", *words]), message)

    assert chosen("--run", "r") == ("tuned",)
    assert chosen() == ("base",)
    assert chosen(message="Be brief.") == ("prompted",)
    assert chosen("--arms", "tuned,base", "--run", "r") == ("base", "tuned")
    with pytest.raises(UserError, match="prompted needs a system message"):
        chosen("--arms", "prompted")


def test_the_table_is_80_columns_wide():
    long = Answer("word " * 60 + "x" * 90 + "\nend", 12345, 0.1, 1234.5, True)
    lines = format_table({"base": Answer("", 1, 0.1, 0.2, True), "prompted": long, "tuned": long}).splitlines()
    assert max(map(len, lines)) <= 80
    assert "(empty)" in lines[1]


def generate(monkeypatch, capsys, *words):
    """Run the script in this process; returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    runpy.run_path(str(REPOSITORY / "scripts" / "generate.py"), run_name="__main__")
    return capsys.readouterr()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "chart.png"
    path.write_bytes(chart(0)[0])
    return path


def test_one_arm_prints_its_answer_alone(runs, answerer, picture, monkeypatch, capsys):
    said = generate(monkeypatch, capsys, "--run", runs[0], "--images", picture, "--question", chart(0)[1],
                    "--max_new_tokens", TOKENS)  # fmt: skip
    assert said.out == answer(answerer, 0, "tuned") + "\n"
    assert " s, first token after " in said.err


def test_an_answer_is_as_long_as_the_run_says_unless_another_length_is_given(picture, tmp_path, monkeypatch, capsys):
    run = write_builtin_run(tmp_path / "run", 0, MESSAGES[0], max_new_tokens=1)
    words = ("--run", run, "--images", picture, "--question", chart(0)[1], "--json")
    for given, tokens in (((), 1), (("--max_new_tokens", 2), 2)):
        found = json.loads(generate(monkeypatch, capsys, *words, *given).out)
        assert found["arms"]["tuned"]["tokens"] == tokens


def test_several_arms_are_set_side_by_side(runs, answerer, picture, monkeypatch, capsys):
    words = ("--run", runs[0], "--images", picture, "--question", chart(0)[1], "--max_new_tokens", TOKENS)
    arms = ("base", "prompted", "tuned")
    expected = {arm: answer(answerer, 0, arm) for arm in arms}
    out = generate(monkeypatch, capsys, *words, "--arms", "tuned,base,prompted").out
    assert [line for line in out.splitlines() if line.startswith("[")] == ["[base]", "[prompted]", "[tuned]"]
    table = out.split("\n\n")[-1]
    assert all(expected[arm].split()[0] in table for arm in arms)
    found = json.loads(generate(monkeypatch, capsys, *words, "--arms", "base,prompted,tuned", "--json").out)
    assert {arm: entry["answer"] for arm, entry in found["arms"].items()} == expected
    assert found["system_message"] == MESSAGES[0]
    assert found["precision"]["scored"] == "float32"


def test_a_base_model_alone_reads_questions_and_several_images(picture, tmp_path, monkeypatch, capsys):
    questions = tmp_path / "questions"
    questions.write_text("Which bar is the tallest?\n\nWhich bar is the shortest?\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions.read_text()))
    words = (
        "--model_name_or_path",
        "builtin:tiny-qwen2-vl",
        "--dtype",
        "float32",
        "--images",
        picture,
        picture,
        "--json",
    )
    lines = [json.loads(line) for line in generate(monkeypatch, capsys, *words).out.splitlines()]
    assert [line["question"] for line in lines] == ["Which bar is the tallest?", "Which bar is the shortest?"]
    assert all(set(line["arms"]) == {"base"} and len(line["images"]) == 2 for line in lines)


def test_questions_are_utf_8(monkeypatch):
    options = parse(GenerateOptions, ["--run", "x", "--images", "y"])

    def typed(content, handler):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=handler))
        return list(read_questions(options))

    for handler in ("strict", "surrogateescape"):  # the latter in the C locale
        assert typed("\ufeffA café?\n\nB?\n".encode(), handler) == ["A café?", "B?"]
        with pytest.raises(UserError, match="the standard input is not UTF-8 text"):
            typed("A café?".encode("latin-1"), handler)
    with pytest.raises(UserError, match="--question is not UTF-8 text"):
        check_options(dataclasses.replace(options, question="caf\udce9"))


def test_a_reader_who_leaves_ends_the_script_without_a_word(runs, picture, tmp_path, monkeypatch):
    def gone(answers):
        raise BrokenPipeError

    monkeypatch.setattr("qwen_vl_sft.inference.answer_lines.print_stream", gone)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(
            sys, "argv", ["generate.py", "--run", str(runs[0]), "--images", str(picture), "--question", "?"]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "scripts/generate.py"), run_name="__main__")
    assert ended.value.code == 1


def test_a_wrong_image_ends_with_two_and_prints_nothing(runs, tmp_path):
    (tmp_path / "a.png").write_text("x")
    done = run_process("scripts/generate.py", "--run", runs[0], "--images", tmp_path / "a.png", "--question", "?")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1].startswith("error: image ")
    assert Path(tmp_path / "a.png").read_text() == "x"
