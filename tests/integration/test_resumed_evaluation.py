"""An evaluation goes on with the rows and weights that it was begun with, and with no others."""

import json
import shutil

import pytest
import torch

from fixtures.evaluation import plan, write_run
from fixtures.messages import BLUE, RED, conversation_row, png, write_messages
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.evaluate import evaluate
from qwen_vl_sft.evaluation.task import describe_task, prepare


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("resumed")
    data = write_data(root / "data")
    return write_run(root, data, dataset_format="messages")


def write_data(folder, questions=("one", "two", "three"), answer="red"):
    write_messages(folder, [conversation_row(f"<image>Which color is {name}?", answer) for name in questions])
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    return folder


def described(*asked):
    ready = plan(*asked)
    return describe_task(ready, prepare(ready))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: write_data(data, ("one", "2", "three")),
        lambda data: write_data(data, answer="blue"),
        lambda data: (data / RED).write_bytes(png("blue")),
        lambda data: (data / "test.jsonl").write_text((data / "test.jsonl").read_text().replace(RED, BLUE)),
    ],
    ids=["question", "label", "image in its place", "another image"],
)
def test_corrected_rows_are_other_rows(run, tmp_path, change):
    data = write_data(tmp_path / "data")
    asked = ("--run", run, "--output_dir", tmp_path / "out", "--dataset_name", data)
    before = described(*asked)
    assert described(*asked) == before
    change(data)
    after = described(*asked)
    assert {name for name in before if before[name] != after[name]} == {"rows_digest"}


def test_rows_are_told_apart_by_all_that_is_asked(run, tmp_path):
    def digest(*turns):
        rows = [{"messages": [{"role": role, "content": text} for role, text in turns], "images": []}]
        (write_messages(tmp_path / "data", rows) / "train.jsonl").rename(tmp_path / "data/test.jsonl")
        asked = ("--run", run, "--output_dir", tmp_path / "out", "--dataset_name", tmp_path / "data")
        return described(*asked)["rows_digest"]

    last = ("user", "And now?"), ("assistant", "red")
    assert digest(("user", "A?"), ("assistant", "no"), *last) != digest(("user", "B?"), ("assistant", "no"), *last)


def test_other_weights_in_the_folder_of_the_base_are_another_base(run, tmp_path):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(run.parent / "model", tmp_path / "model")
    asked = ("--run", run, "--output_dir", tmp_path / "out", "--model_name_or_path", base)
    before = described(*asked)
    weights = load_file(base / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: torch.zeros_like(weights[name])}, base / "model.safetensors", {"format": "pt"})
    after = described(*asked)
    assert {name for name in before if before[name] != after[name]} == {"base_weights"}


def test_a_base_that_is_gone_is_missed_only_where_an_arm_needs_it(run, tmp_path):
    full = tmp_path / "run"
    full.mkdir()
    for path in [*run.iterdir(), run.parent / "model/model.safetensors"]:
        if path.is_file() and not path.name.startswith("adapter"):
            shutil.copy(path, full / path.name)
    asked = ("--output_dir", tmp_path / "out", "--model_name_or_path", tmp_path / "gone")
    assert described("--run", full, *asked, "--arms", "tuned")["base_weights"] is None
    for words in (("--run", full, "--arms", "base,tuned"), ("--run", run, "--arms", "tuned")):
        with pytest.raises(UserError, match=r"model_name_or_path: .*gone"):
            described(*words, *asked)
    (tmp_path / "gone").mkdir()
    with pytest.raises(UserError, match=r"gone cannot be read: No such file .*config\.json"):
        described("--run", run, *asked)


@pytest.mark.parametrize("forgotten", [(), ("rows_digest", "base_weights")], ids=["corrected", "of a former version"])
def test_old_answers_are_not_given_to_corrected_rows(run, tmp_path, forgotten):
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    asked = ("--run", run, "--output_dir", out, "--dataset_name", data, "--arms", "base", "--max_new_tokens", 2)
    evaluate(plan(*asked))
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({name: settings[name] for name in settings if name not in forgotten}))
    if not forgotten:
        write_data(data, ("one", "2", "three"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"begun with other settings .*rows_digest: \w+, now \w+.*--overwrite"):
        evaluate(plan(*asked, "--resume"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
