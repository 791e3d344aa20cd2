"""Batches where one process has only text and another three images, or no row that can be read: the losses of one process."""

import json
import re

import pytest

from fixtures.messages import conversation_row, png
from fixtures.processes import launch, run_process
from qwen_vl_sft.checkpointing.row_log import read_row_log
from qwen_vl_sft.errors import EXIT_USER_ERROR


def arguments(shallow_model, data, folder, scope, packing, **other):
    keys = {
        "model_name_or_path": shallow_model,
        "dataset_name": data,
        "dataset_test_split": "train",
        "output_dir": folder,
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "lora_scope": scope,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "global_batch_size": 4,
        "packing": packing,
        "max_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "predict_with_generate": "true",
        "max_new_tokens": 2,
        "gradient_checkpointing": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        **other,
    }
    return ["scripts/sft.py", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def measured(folder):
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    return losses + [entry[key] for entry in entries for key in ("eval_loss", "eval_anls") if key in entry]


@pytest.fixture(scope="module")
def single(shallow_model, mixed_data, tmp_path_factory):
    """What one process measures, by the scope of LoRA."""
    found = {}
    for scope in ("language", "all"):
        folder = tmp_path_factory.mktemp("single") / scope
        done = run_process(*arguments(shallow_model, mixed_data, folder, scope, "false"))
        assert done.returncode == 0, done.stderr
        found[scope] = measured(folder)
    return found


@pytest.mark.parametrize(
    ("config", "scope", "packing"),
    [
        ("cpu", "all", "false"),
        ("zero3", "all", "true"),
        ("fsdp2", "language", "true"),
        pytest.param("zero2", "all", "true", marks=pytest.mark.long),
        pytest.param("zero3", "language", "false", marks=pytest.mark.long),
        pytest.param("fsdp2", "all", "false", marks=pytest.mark.long),
    ],
)
def test_a_process_with_text_alone_keeps_the_others_going(
    config, scope, packing, shallow_model, mixed_data, single, tmp_path
):
    done = launch(config, *arguments(shallow_model, mixed_data, tmp_path / "run", scope, packing))
    assert done.returncode == 0, done.stderr[-3000:]
    assert measured(tmp_path / "run") == pytest.approx(single[scope], abs=2e-3)


# Rows whose images cannot be decoded, which training finds out: the scan reads headers alone.
GOOD = [conversation_row(f"<image>Which color is number {number}, the large one?", "a red one") for number in range(3)]
BAD = conversation_row("<image>Which?", "blue", images=("images/bad.png",))
# Each row is a micro-batch of its own, and each step has all rows; so in each step one micro-batch is bad as a whole.
FOUND_LATE = {
    "verify_images": "false",
    "tokens_per_batch": 70,
    "dataloader_num_workers": 1,
    "log_row_ids": "true",
    "eval_on_start": "true",
}


@pytest.fixture(scope="module")
def broken(mixed_data):
    """A dataset of four rows, the cheapest of which cannot be read, and one of the other three."""
    (mixed_data / "images/bad.png").write_bytes(png("blue")[:60])
    (mixed_data / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*GOOD, BAD]))
    (mixed_data / "sound.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return mixed_data


def on_broken(shallow_model, data, folder, packing, split="broken", **other):
    splits = {"dataset_train_split": split, "dataset_test_split": split}
    return arguments(shallow_model, data, folder, "language", packing, **FOUND_LATE, **splits, **other)


@pytest.fixture(scope="module")
def without_bad_row(shallow_model, broken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "run"
    done = run_process(*on_broken(shallow_model, broken, folder, "false", "sound"))
    assert done.returncode == 0, done.stderr[-3000:]
    return measured(folder)


@pytest.mark.parametrize(
    ("config", "packing"),
    [(None, "false"), ("zero3", "true"), pytest.param("fsdp2", "false", marks=pytest.mark.long)],
)
def test_a_row_that_cannot_be_read_is_left_out_on_all_processes(
    config, packing, shallow_model, broken, without_bad_row, tmp_path
):
    run = tmp_path / "run"
    words = on_broken(shallow_model, broken, run, packing, bad_rows="skip")
    done = launch(config, *words) if config else run_process(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "row 3 image" in done.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["steps"], metrics["skipped_while_training"]) == (2, 2)
    # Once an evaluation, although the loss and the answers both meet it.
    assert (metrics["eval_skipped_rows"], metrics["skipped_while_evaluating"]) == (1, 2)
    assert "skipped     2 rows that could not be read while training\n" in done.stdout
    assert "skipped     2 rows that could not be read while evaluating\n" in done.stdout
    ranks = range(2 if config else 1)
    assert [len((run / f"row_ids-{rank}.jsonl").read_text().splitlines()) for rank in ranks] == [2 for _ in ranks]
    assert all(sorted(rows) == [0, 1, 2] for rows in read_row_log(run).values())
    # The mean over the tokens of the rows that are left, in training and in evaluation.
    assert measured(run) == pytest.approx(without_bad_row, abs=2e-3)


@pytest.mark.parametrize(
    ("config", "packing"),
    [
        (None, "true"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("zero2", "true"), ("fsdp2", "false"))),
    ],
)
def test_a_row_that_cannot_be_read_ends_the_run_by_its_name(config, packing, shallow_model, broken, tmp_path):
    words = on_broken(shallow_model, broken, tmp_path / "run", packing)
    done = launch(config, *words) if config else run_process(*words)
    assert done.returncode == (1 if config else EXIT_USER_ERROR), done.stderr[-3000:]
    assert re.search(r"error: .*mixed.* \[broken\], row 3 image .*bad\.png cannot be decoded", done.stderr)
