"""Batches where one process has only text and another three images: no hang, and the losses of one process."""

import json

import pytest
from conftest import conversation_row, launch, png, run_process

from qwen_vl_sft import tiny

RED, BLUE = "images/red.png", "images/blue.png"
TEXT = [conversation_row(f"What is {number}?", f"It is {number}", images=()) for number in range(4)]
SHOWN = [
    conversation_row(f"<image><image><image>Which is number {number}?", "red and blue", images=(RED, BLUE, RED))
    for number in range(4)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "images").mkdir()
    for color in ("red", "blue"):
        (folder / f"images/{color}.png").write_bytes(png(color))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*TEXT, *SHOWN]))
    return folder


def arguments(data, folder, scope, packing):
    keys = {
        "model_name_or_path": tiny.MODEL_DIR,
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
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "no",
        "predict_with_generate": "true",
        "max_new_tokens": 4,
        "gradient_checkpointing": "false",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    return ["scripts/sft.py", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def measured(folder):
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    return losses + [entry[key] for entry in entries for key in ("eval_loss", "eval_anls") if key in entry]


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    """What one process measures, by the scope of LoRA."""
    found = {}
    for scope in ("language", "all"):
        folder = tmp_path_factory.mktemp("single") / scope
        done = run_process(*arguments(data, folder, scope, "false"))
        assert done.returncode == 0, done.stderr
        found[scope] = measured(folder)
    return found


@pytest.mark.parametrize(
    ("config", "scope", "packing"),
    [
        ("cpu", "all", "false"),
        ("zero2", "all", "true"),
        ("zero3", "language", "false"),
        ("zero3", "all", "true"),
        ("fsdp2", "language", "true"),
        ("fsdp2", "all", "false"),
    ],
)
def test_a_process_with_text_alone_keeps_the_others_going(config, scope, packing, data, single, tmp_path):
    done = launch(config, *arguments(data, tmp_path / "run", scope, packing))
    assert done.returncode == 0, done.stderr[-3000:]
    assert measured(tmp_path / "run") == pytest.approx(single[scope], abs=2e-3)
