"""scripts/sft.py as a user starts it. What needs no process of its own runs inside this one."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from fixtures.messages import conversation_row, png
from fixtures.processes import launch, run_process
from fixtures.repository import REPOSITORY
from qwen_vl_sft import errors, tiny
from qwen_vl_sft.config.settings import DataSettings
from qwen_vl_sft.planning.find_rows import remembered_sizes
from qwen_vl_sft.resilience import signals

SCRIPT = "scripts/sft.py"


class Exit(Exception):
    """Stands for the hard exit of a script."""


@pytest.fixture
def sft(monkeypatch, capsys):
    """Runs scripts/sft.py in this process: its exit code and what it printed."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("sft", REPOSITORY / SCRIPT)
    script = importlib.util.module_from_spec(spec)

    def leave(code):
        raise Exit(code)

    def run(*words):
        monkeypatch.setattr(os, "_exit", leave)
        monkeypatch.setattr(signals.SignalWatcher, "begin", lambda watch: None)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        monkeypatch.chdir(REPOSITORY)
        spec.loader.exec_module(script)
        try:
            script.main()
        except Exit as error:
            return error.args[0], capsys.readouterr().err
        return 0, capsys.readouterr().out

    return run


@pytest.fixture
def good(tmp_path, messages_folder):
    """Keys of a run that works, on data that a test may spoil."""
    folder = messages_folder([conversation_row(), conversation_row(answer="blue", images=("images/blue.png",))])
    keys = {
        "model_name_or_path": tiny.MODEL_DIR,
        "dataset_name": folder,
        "output_dir": tmp_path / "run",
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": "none",
    }
    return keys


def words(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def snapshot(folder: Path):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


BAD_RECIPES = {
    "unknown key": ({"learnin_rate": 1}, "did you mean learning_rate?"),
    "wrong type": ({"learning_rate": "fast"}, "'fast' is not a number"),
    "4-bit in full": ({"load_in_4bit": "true", "use_peft": "false"}, "quantized weights cannot be trained"),
    "4 and 8 bit": ({"load_in_4bit": "true", "load_in_8bit": "true"}, "both set; keep one"),
    "LoRA keys in full": ({"use_peft": "false", "lora_r": 4}, "lora_r is set but use_peft is false"),
    "freezing under LoRA": ({"freeze_vision_tower": "true"}, "is for full fine-tuning"),
    "no evaluation data": ({"eval_strategy": "steps"}, "dataset_test_split is not"),
    "best without evaluation": ({"load_best_model_at_end": "true"}, "load_best_model_at_end needs evaluation"),
    "best by what is not measured": (
        {"metric_for_best_model": "relaxed_acuracy"},
        "is not measured; did you mean relaxed_accuracy?",
    ),
    "best by answers not asked for": (
        {"metric_for_best_model": "eval_relaxed_accuracy"},
        "is measured with predict_with_generate: true only",
    ),
    "keeping the worst": (
        {"metric_for_best_model": "loss", "greater_is_better": "true"},
        "would keep the worst model by loss",
    ),
    "keeping the worst by the measure that is taken without one": (
        {"load_best_model_at_end": "true", "greater_is_better": "true"},
        "would keep the worst model by eval_loss",
    ),
    "best by nothing": ({"save_strategy": "best"}, "save_strategy: best needs metric_for_best_model"),
    "best of no evaluations": ({"save_strategy": "best"}, "save_strategy: best saves only after evaluations"),
    "stream without steps": ({"dataset_streaming": "true", "max_steps": -1}, "dataset_streaming needs max_steps"),
    "batch that does not divide": (
        {"global_batch_size": 9, "per_device_train_batch_size": 4},
        "= 4; global_batch_size 8 or per_device_train_batch_size 3 would do",
    ),
    "batch contradicted": (
        {"global_batch_size": 4, "gradient_accumulation_steps": 3},
        "= 3; remove gradient_accumulation_steps",
    ),
    "steps of so many tokens, padded": ({"global_batch_tokens": 100}, "global_batch_tokens needs packing: true"),
    "steps of rows and of tokens": (
        {"global_batch_tokens": 100, "global_batch_size": 2, "packing": "true"},
        "global_batch_size and global_batch_tokens both say what an optimizer step takes",
    ),
    "steps of too few tokens": (
        {"global_batch_tokens": 20, "packing": "true"},
        "and a step must have room for 2 such rows so that no step is empty; write",
    ),
    "both half precisions": ({"bf16": "true", "fp16": "true"}, "fp16 and bf16 are both true"),
    "checkpoints of weights alone": (
        {"save_only_model": "true"},
        "save_only_model: true leaves out what a resume needs",
    ),
    "checkpoints of each machine": (
        {"save_on_each_node": "true"},
        "with output_dir on storage that all machines share",
    ),
    "pixel limits crossed": ({"min_pixels": 10000, "max_pixels": 1000}, "is above max_pixels"),
    "zero rows": ({"max_train_samples": 0}, "max_train_samples: 0 must be at least 1"),
    "logger not installed": ({"report_to": "wandb"}, "wandb is not installed; pip install wandb"),
    "auto of a stream": (
        {"gradient_checkpointing": "auto", "dataset_streaming": "true"},
        "a stream does not show which one that is",
    ),
    "auto of reentrant checkpoints": (
        {"gradient_checkpointing": "auto", "gradient_checkpointing_kwargs": "{use_reentrant: true}"},
        "auto cannot try gradient_checkpointing_kwargs: use_reentrant: true",
    ),
    "auto of every second layer": (
        {"gradient_checkpointing": "auto", "gradient_checkpointing_kwargs": "{every_n_layers: 2}"},
        "remove one of the two",
    ),
    "checkpointing of some kind": ({"gradient_checkpointing": "some"}, "'some' is not true or false or auto"),
    "flash attention": ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    "mistyped key inside a key": (
        {"gradient_checkpointing_kwargs": "{use_reentrnat: false}"},
        "unknown key use_reentrnat; did you mean use_reentrant?",
    ),
    "workers below none": ({"dataloader_num_workers": -1}, "dataloader_num_workers: -1 must be at least 0"),
    "unknown level of logging": ({"log_level": "loud"}, "log_level: 'loud' is unknown; one of detail, debug, info,"),
    "no logger by nothing": ({"report_to": "null"}, "report_to: None is unknown"),
    "missing model": ({"model_name_or_path": "./nowhere"}, "model_name_or_path: ./nowhere is not a folder"),
    "missing data": ({"dataset_name": "./nowhere"}, "dataset_name: ./nowhere does not exist"),
    "missing checkpoint": ({"resume_from_checkpoint": "./nowhere"}, "./nowhere is not a folder"),
    "target that matches nothing": ({"lora_target_modules": "wq"}, "match(es) no linear layer"),
    "layer in full that is none": (
        {"lora_modules_to_save": "nrom"},
        "nrom matches no layer of the model; did you mean norm?",
    ),
    "quantized layers in full": (
        {"load_in_4bit": "true", "lora_modules_to_save": "[norm, merger]"},
        "lora_modules_to_save: merger holds 2 linear layer(s), such as model.visual.merger.mlp.0, which load_in_4bit",
    ),
    "unknown split": ({"dataset_train_split": "tran"}, "has no split 'tran'"),
    "over-long rows": ({"max_length": 20}, "2 of 2 rows are too long"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_bad_recipe_gets_one_message_and_changes_nothing(name, sft, good, tmp_path):
    changes, told = BAD_RECIPES[name]
    before = snapshot(tmp_path)
    code, message = sft(*words({**good, **changes}))
    assert code == errors.EXIT_USER_ERROR
    assert told in message
    assert "Traceback" not in message
    assert snapshot(tmp_path) == before


BAD_ROWS = {
    "no answer": (conversation_row(answer=""), "row 2 has an empty answer"),
    "no assistant turn": (
        {"messages": [{"role": "user", "content": "hi"}], "images": []},
        "row 2 has no assistant turn",
    ),
    "image missing": (conversation_row(images=("images/none.png",)), "none.png does not exist"),
    "image unreadable": (conversation_row(images=("images/bad.png",)), "bad.png cannot be"),
    "placeholders unequal": (conversation_row("<image><image>?"), "2 image placeholder(s) in its messages but 1"),
    "forged turn": (
        conversation_row("<image>a<|im_start|>b"),
        "special token <|im_start|> inside the text of its user",
    ),
    "forged image": (
        conversation_row("<image>a<|image_pad|>b"),
        "special token <|image_pad|> inside the text of its user",
    ),
    "path outside": (conversation_row(images=("../run.png",)), "lies outside the data folder"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(name, sft, good, messages_folder, tmp_path):
    row, told = BAD_ROWS[name]
    folder = messages_folder([conversation_row(), conversation_row(answer="blue"), row])
    (folder / "images/bad.png").write_bytes(png()[:60])
    before = snapshot(tmp_path)
    code, message = sft(*words(good))
    assert code == errors.EXIT_USER_ERROR
    assert told in message
    assert "error: 1 of 3 rows cannot be used; fix them, or set bad_rows: skip to leave them out:\n" in message
    assert f"{folder} [train], row 2" in message
    assert snapshot(tmp_path) == before
    code, printed = sft(*words({**good, "bad_rows": "skip"}), "--dry_run")
    assert code == 0
    assert "train       2 rows (1 bad skipped)" in printed


def test_every_problem_is_told_at_once(sft, good):
    changes = {"load_in_4bit": "true", "use_peft": "false", "eval_strategy": "steps", "learning_rate": -1}
    _, message = sft(*words({**good, **changes}))
    assert "error: 3 problems\n  - " in message


def test_a_used_folder_is_refused_with_the_ways_out(sft, good):
    run = Path(good["output_dir"])
    run.mkdir()
    (run / "file").touch()
    code, message = sft(*words(good))
    assert code == errors.EXIT_USER_ERROR
    for way in ("--resume_from_checkpoint latest", "--overwrite_output_dir true", "--output_dir"):
        assert way in message
    code, message = sft(*words({**good, "overwrite_output_dir": "true"}))
    assert "does not look like a run folder, so it is not deleted" in message
    assert (run / "file").exists()


def test_dry_run_tells_the_plan_and_writes_nothing(sft, good, tmp_path):
    rows = good["dataset_name"] / "train.jsonl"
    rows.write_text("".join(json.dumps({**json.loads(row), "id": 7}) + "\n" for row in rows.read_text().splitlines()))
    before = snapshot(tmp_path)
    keys = {**good, "max_steps": -1, "num_train_epochs": 3, "global_batch_size": 4, "lora_r": 8}
    code, printed = sft(*words(keys), "--dry_run")
    assert code == 0
    assert "lora_r: 8" in printed
    assert "batch       4 rows a step = 1 a device x 1 x 4 accumulated" in printed
    assert "steps       3" in printed
    assert "train       2 rows" in printed
    assert "memory      about 0.0 GiB on a GPU with no layer checkpointed, 0.0 with all" in printed
    kept = remembered_sizes(DataSettings(dataset_name=str(good["dataset_name"])), str(tiny.MODEL_DIR))
    assert (kept.rows, kept.images) == (2, 1)
    assert "ignored     1 column(s) that are not read: id\n" in printed
    assert "trains      LoRA r=8 on 28 layers: down_proj, gate_proj, k_proj" in printed
    assert "language " in printed
    assert " tokens, 2 of them learned, between {{ and }}" in " ".join(printed.split())
    assert printed.endswith("    <|im_start|>assistant\n    {{red<|im_end|>}}\n")
    assert snapshot(tmp_path) == before


def test_a_user_error_is_exit_code_2_for_a_real_process(good):
    finished = run_process(SCRIPT, *words({**good, "learnin_rate": 1}))
    assert finished.returncode == errors.EXIT_USER_ERROR
    assert finished.stderr.strip() == "error: command line: unknown key learnin_rate; did you mean learning_rate?"


def test_a_launched_user_error_ends_with_its_message(good):
    finished = launch("cpu", SCRIPT, *words({**good, "learnin_rate": 1}))
    assert finished.returncode != 0
    assert finished.stderr.count("error: command line: unknown key learnin_rate") <= 3
    assert "exitcode  : 2" in finished.stderr
    assert "unknown key learnin_rate; did you mean learning_rate?" in finished.stderr.rstrip().splitlines()[-2]


def read_log(run: Path):
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tutorial_keys(small_model, shared):
    """recipes/chartqa_qlora.yaml on real charts, small enough for a CPU."""
    return {
        "recipe": "recipes/chartqa_qlora.yaml",
        "model_name_or_path": small_model,
        "dataset_name": shared / "chartqa",
        "dataset_train_split": "train[:24]",
        "dataset_test_split": "val[:3]",
        "max_pixels": 28 * 28 * 12,
        "dtype": "float32",
        "bf16": "false",
        "learning_rate": "2e-2",
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "lora_dropout": 0.0,
        "dataloader_num_workers": 1,
    }


@pytest.fixture(scope="module")
def launched_run(tutorial_keys, tmp_path_factory):
    """The tutorial's recipe on real data and two processes."""
    run = tmp_path_factory.mktemp("runs") / "two"
    finished = launch("cpu", SCRIPT, *words({**tutorial_keys, "output_dir": run}))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run, finished


def test_the_tutorial_on_real_charts_learns_on_two_processes(launched_run):
    run, finished = launched_run
    losses = [entry["loss"] for entry in read_log(run) if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["steps"], metrics["work"]["rows"], metrics["data"]["train"]["rows"]) == (6, 48, 24)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world"] == {"strategy": "ddp", "processes": 2, "rank": 0, "local_rank": 0, "on_cpu": True}
    assert "strategy    ddp, 2 process(es) on CPU" in finished.stdout
    assert "warning: tf32: true has no effect on a CPU" in finished.stderr
    assert "6/6  loss " in finished.stdout + finished.stderr
    assert "6/6  eval loss " in finished.stdout + finished.stderr
    # The data loader's workers, which are kept to the end, leave in silence.
    assert "Traceback" not in finished.stderr


def test_the_run_folder_holds_what_the_readme_says(launched_run):
    from PIL import Image
    from transformers import AutoProcessor

    from qwen_vl_sft.config.reading import read_recipe
    from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE

    run, _ = launched_run
    umask = os.umask(0)
    os.umask(umask)
    assert (run / "adapter_model.safetensors").stat().st_mode & 0o044 == 0o044 & ~umask
    assert (run / "system_message.txt").read_text() == CHARTQA_SYSTEM_MESSAGE
    processor = AutoProcessor.from_pretrained(run)
    assert processor.image_processor.size["longest_edge"] == 28 * 28 * 12
    assert processor.chat_template
    assert read_recipe(run / "recipe.yaml", {}).data.max_pixels == 28 * 28 * 12
    assert Image.open(run / "loss.png").size[0] > 300
    versions = json.loads((run / "environment.json").read_text())["versions"]
    assert {"trl", "qwen_vl_sft"} <= {name for name, version in versions.items() if version}
    assert list((run / "runs").rglob("events.out.tfevents*"))
    assert not (run / "README.md").exists()


def test_one_process_gives_the_same_losses_and_adapter(launched_run, tutorial_keys, tmp_path):
    from safetensors.torch import load_file

    run, _ = launched_run
    finished = run_process(SCRIPT, *words({**tutorial_keys, "output_dir": tmp_path / "one"}))
    assert finished.returncode == 0, finished.stderr[-3000:]
    for key in ("loss", "eval_loss"):
        two = [entry[key] for entry in read_log(run) if key in entry]
        one = [entry[key] for entry in read_log(tmp_path / "one") if key in entry]
        assert one == pytest.approx(two, abs=1e-4)
    theirs = load_file(run / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "one/adapter_model.safetensors").items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-3)


def test_all_weights_train_in_float32_and_are_saved_as_the_recipe_says(good):
    """Steps of 1e-5, most of which bfloat16 would lose."""
    from safetensors.torch import load_file

    keys = {"use_peft": "false", "freeze_vision_tower": "true", "dtype": "bfloat16", "bf16": "true"}
    keys |= {"learning_rate": "1e-5", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    finished = run_process(SCRIPT, *words(good | keys))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "precision   bfloat16, what trains is kept in float32" in finished.stdout
    run = good["output_dir"]
    saved, final = (load_file(folder / "model.safetensors") for folder in (run / "checkpoint-2", run))
    assert {weight.dtype for weight in final.values()} == {torch.bfloat16}
    assert json.loads((run / "config.json").read_text())["dtype"] == "bfloat16"
    start = load_file(tiny.MODEL_DIR / "model.safetensors")
    for name, weight in saved.items():
        assert torch.equal(weight.to(torch.bfloat16), final[name]), name
        vision = "visual." in name and "merger" not in name
        assert weight.dtype == (torch.bfloat16 if vision else torch.float32), name
    name = "model.layers.0.mlp.down_proj.weight"
    moved = saved[name] - start[name].to(torch.bfloat16).float()
    assert (moved != 0).float().mean() > 0.9


def test_the_adapter_loads_back_and_changes_the_output(launched_run, tutorial_keys):
    from peft import PeftModel

    from qwen_vl_sft.batching.collator import pad
    from qwen_vl_sft.config.settings import ModelSettings
    from qwen_vl_sft.data.dataset import open_rows
    from qwen_vl_sft.data.encoding import Encoder
    from qwen_vl_sft.modeling.base_model import load_model, load_processor

    run, _ = launched_run
    base = ModelSettings(
        model_name_or_path=str(tutorial_keys["model_name_or_path"]), dtype="float32", load_in_4bit=True
    )
    encoder = Encoder(load_processor(base, max_pixels=28 * 28 * 12))
    batch = pad(
        [open_rows(str(tutorial_keys["dataset_name"]), "val[:1]").encode({"row": 0}, encoder)], encoder.pad_token_id
    )
    model = load_model(base, on_cpu=True)
    with torch.no_grad():
        before = model(**batch).loss
        after = PeftModel.from_pretrained(model, run)(**batch).loss
    assert after < before - 0.1


def test_resume_is_the_run_it_resumes(launched_run, tutorial_keys, tmp_path):
    """From the checkpoint of step 4, in the middle of the second epoch."""
    import shutil

    run, _ = launched_run
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(run / "checkpoint-4", resumed / "checkpoint-4")
    keys = {**tutorial_keys, "output_dir": resumed, "resume_from_checkpoint": "latest"}
    finished = launch("cpu", SCRIPT, *words(keys))
    assert finished.returncode == 0, finished.stderr[-3000:]
    wanted = [entry["loss"] for entry in read_log(run) if "loss" in entry]
    assert [entry["loss"] for entry in read_log(resumed) if "loss" in entry] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_quickstart_trains_on_every_strategy(config, tmp_path):
    """What ran is asserted inside the run, by launch.check_running; here that it trains, evaluates and loads back."""
    keys = {"recipe": "recipes/quickstart.yaml", "output_dir": tmp_path / "run", "max_steps": 4, "max_eval_samples": 8}
    keys |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    finished = launch(config, SCRIPT, *words({**keys, "per_device_train_batch_size": 2, "global_batch_size": 8}))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert f"strategy    {config}, 2 process(es) on CPU" in finished.stdout
    losses = [entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert len(losses) == 4
    assert (tmp_path / "run/adapter_model.safetensors").is_file()


def test_a_stream_trains(sft, good, messages_folder):
    keys = {**good, "dataset_streaming": "true", "max_steps": 2, "global_batch_size": 2}
    code, printed = sft(*words(keys))
    assert code == 0, printed
    assert "train       a stream, checked as it comes" in printed
    assert len(read_log(Path(good["output_dir"]))) >= 1
