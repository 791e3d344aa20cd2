"""scripts/benchmark.py and benchmark_answers.py: ways of training, and of answering, side by side."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.messages import conversation_row
from fixtures.processes import run_process
from qwen_vl_sft import tiny
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.tools.benchmark import FEWEST_ROWS, repeated, run_session
from qwen_vl_sft.tools.benchmark_answers import run_session as answer_session
from qwen_vl_sft.tools.options import AnswerBenchmarkOptions, BenchmarkOptions


def test_no_rounds_are_refused_before_anything_is_made(tmp_path):
    words = ["--config", tiny.MODEL_DIR, "--rounds", "0", "--output_dir", tmp_path / "out"]
    finished = run_process("scripts/benchmark.py", *words)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1), finished.stderr
    assert "--rounds" in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("names", "told"), [("trl,pakced", "unknown variant 'pakced'"), (" ,", "names none")])
def test_variants_are_read_before_anything_is_made(names, told, tmp_path):
    options = BenchmarkOptions(config="x", variants=names, rounds=1, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match=f"--variants: {told}; known are trl, padded"):
        run_session(options)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_repeated_share_no_work(tiny_processor, messages_folder):
    rows, encoder = [conversation_row("<image>Which?"), conversation_row("<image>And now?")], Encoder(tiny_processor)
    again = repeated(scan(open_rows(str(messages_folder(rows)), "train"), encoder), 2)
    encoded = [again.rows.encode({"row": index}, encoder) for index in range(4)]
    one, two, three, four = (row.media[0].content_hash for row in encoded)
    assert one == two != three == four  # both rows show one image
    assert again.lengths.prefix[0] != again.lengths.prefix[2]
    assert again.rows.conversation({"row": 0}).media[0].content_hash == one


@pytest.mark.long
def test_ways_of_training_are_measured_on_rows_enough(tmp_path):
    words = [
        "--recipe",
        "recipes/quickstart.yaml",
        "--config",
        tiny.MODEL_DIR,
        "--variants",
        "trl,packed_plain,shared_cached",
    ]
    words += ["--rounds", "1", "--seconds", "1", "--use_cpu", "true", "--load_in_4bit", "false"]
    finished = run_process("scripts/benchmark.py", *words, "--max_train_samples", "64", "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    about = json.loads((tmp_path / "results.json").read_text())
    trl, packed, cached = about["results"]
    assert about["steps"]["trl"] * 4 >= FEWEST_ROWS
    assert (trl["variant"], trl["ratio"], packed["variant"]) == ("trl", 1.0, "packed_plain")
    assert packed["ratio"] == packed["rows_per_second"] / trl["rows_per_second"]
    # Without the vision tower there is less to compute for as many rows.
    assert cached["tflops"] / cached["rows_per_second"] < packed["tflops"] / packed["rows_per_second"]
    assert list((tmp_path / "runs" / "image_features").glob("*/*"))
    assert "| packed_plain  |" in finished.stdout
    assert (tmp_path / "speed.png").stat().st_size > 5_000


def test_ways_of_answering_are_measured_and_their_answers_compared(tmp_path, monkeypatch):
    keys = {"use_cpu": ["true"], "load_in_4bit": ["false"], "dataset_name": [str(tiny.DATA_DIR)]}
    options = AnswerBenchmarkOptions(
        config=str(tiny.MODEL_DIR), recipe=Path("recipes/quickstart.yaml"), output_dir=tmp_path, recipe_keys=keys,
        rows=5, new_tokens=4, long_rows=3, long_tokens=9, rounds=1, batch_size=2,
    )  # fmt: skip
    table = answer_session(options)
    assert table.splitlines()[0].split("|")[1:3] == [" work                  ", " variant "]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["work"] for result in results[::2]] == [
        "one question an image", "rows as they come", "three arms", "long answers",
    ]  # fmt: skip
    assert [result["rows"] for result in results[::2]] == [5, 5, 15, 3]
    assert {result["variant"] for result in results} == {"padded", "engine"}
    assert all(result["differing"] == 0 and result["rows_per_second"] > 0 for result in results)
    # Another answer would be noticed, with its margin.
    monkeypatch.setattr("qwen_vl_sft.tools.benchmark_answers._with_engine", lambda *_: {0: [1, 2]})
    monkeypatch.setattr("qwen_vl_sft.tools.benchmark_answers._padded", lambda *_: {0: [1, 3, 4]})
    answer_session(replace(options, works=("alone",), output_dir=tmp_path / "other"))
    _, other = json.loads((tmp_path / "other/results.json").read_text())["results"]
    assert (other["differing"], len(other["margins"])) == (1, 1)
    assert other["largest_margin"] > 0
    with pytest.raises(UserError, match="--variants: unknown engin; known are padded, engine, graphs"):
        answer_session(replace(options, variants=("engin",)))
    with pytest.raises(UserError, match="--works: unknown al; known are alone"):
        answer_session(replace(options, works=("al",)))
