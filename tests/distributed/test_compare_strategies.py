"""scripts/compare_strategies.py: one recipe on every strategy, and what it makes of the runs."""

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.processes import PROCESS_TIMEOUT, Popen, run_process, still_there
from fixtures.repository import REPOSITORY
from qwen_vl_sft import tiny
from qwen_vl_sft.compat.for_transformers import forget_unused_renamings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.tools import compare_strategies, strategy_report
from qwen_vl_sft.tools.compare_strategies import Case, grid, recipe_of
from qwen_vl_sft.tools.measuring import TEXT, format_table
from qwen_vl_sft.tools.options import CompareStrategiesOptions
from qwen_vl_sft.tools.random_model import make_random_model

SCRIPT = "scripts/compare_strategies.py"
FEW_STEPS = ["--recipe", "recipes/quickstart.yaml", "--max_train_samples", "32", "--global_batch_size", "8"]
FEW_STEPS += ["--max_steps", "4", "--warmup", "1"]
SHORT = [*FEW_STEPS, "--per_device_train_batch_size", "2"]
# float32 on one process and on two: another order of sums.
CLOSE = {"loss_difference": 1e-5, "grad_norm_difference": 1e-4, "weights_difference": 1e-4}


def results_of(folder):
    return {result["run"]: result for result in json.loads((folder / "results.json").read_text())["results"]}


# What is asked for


def test_the_grid_holds_every_case_once():
    cases = list(grid(["single", "zero2"], [2, 4], ["qlora", "full"]))
    assert [case.name for case in cases] == [
        *("qlora-single-1", "qlora-zero2-2", "qlora-zero2-4"),
        *("full-single-1", "full-zero2-2", "full-zero2-4"),
    ]


@pytest.mark.parametrize(
    ("strategies", "processes", "modes", "told"),
    [
        (["dpp"], [2], ["lora"], "--strategies: dpp is not known; there are single, ddp, zero1, zero2, zero3, fsdp2"),
        (["ddp"], [2], ["qlra"], "--modes: qlra is not known"),
        (["ddp"], [0], ["lora"], "processes are counted from 1"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(strategies, processes, modes, told):
    with pytest.raises(UserError, match=told):
        list(grid(strategies, processes, modes))


def test_a_mode_takes_what_it_needs_of_a_recipe():
    written = {"load_in_4bit": True, "lora_r": 4, "global_batch_size": 8, "save_strategy": "epoch", "output_dir": "x"}
    qlora, full = (recipe_of(written, mode, {"max_steps": 9}) for mode in ("qlora", "full"))
    assert (qlora["load_in_4bit"], qlora["lora_r"], qlora["save_strategy"], qlora["max_steps"]) == (True, 4, "no", 9)
    assert (full["use_peft"], full["load_in_4bit"]) == (False, False)
    assert not {"lora_r", "output_dir"} & set(full)


def test_results_need_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(REPOSITORY)
    options = CompareStrategiesOptions(
        strategies=("single",),
        processes=(1,),
        warmup=1,
        recipe=Path("recipes/quickstart.yaml"),
        output_dir=tmp_path / "file",
    )
    with pytest.raises(UserError, match=r"--output_dir: .*file cannot be made: it is a file; name another folder"):
        compare_strategies.plan_experiment(options)


def test_keys_that_a_mode_stands_for_are_refused_before_anything_is_made(tmp_path):
    options = CompareStrategiesOptions(
        modes=("qlora", "lora"), output_dir=tmp_path / "out", recipe_keys={"load_in_4bit": ["true"]}
    )
    with pytest.raises(UserError, match="--load_in_4bit: --modes lora sets it; leave it out, or name other modes"):
        compare_strategies.plan_experiment(options)
    assert not (tmp_path / "out").exists()


def test_batches_may_not_depend_on_the_number_of_processes():
    with pytest.raises(UserError, match="--global_batch_size N"):
        recipe_of({"per_device_train_batch_size": 4}, "lora", {})


# What comes of a run


@pytest.mark.parametrize(
    ("code", "text", "steps", "told"),
    [
        (2, "noise\nerror: lora_r is 0. Set it. More.\n", 0, "refused: lora_r is 0"),
        (1, "error: 2 problems\n  - a is bad; mend it\n  - b\n  exitcode  : 2 (pid: 1)\n", 0, "refused: a is bad"),
        (1, "error: no v1.5 here: x\nreturned non-zero exit status 2.\n", 0, "refused: no v1.5 here: x"),
        (1, "error: step 3: the loss is NaN. Look.\n exitcode  : 2 (pid: 1)\n", 2, "failed: step 3: the loss is NaN"),
        (1, "error: out of memory in a batch. Lower it.\nexitcode  : 2\n", 0, "failed: out of memory in a batch"),
        (1, "error: something of a library\nexitcode  : 1\n", 0, "failed: see "),
        (-9, "", 0, "failed: see "),
        (None, "", 0, "failed: not done after 7 s; see "),
    ],
)
def test_why_a_run_has_no_result(code, text, steps, told, tmp_path):
    log, run = tmp_path / "x.log", tmp_path / "run"
    log.write_text(text)
    run.mkdir()
    if steps:
        (run / "row_ids-0.jsonl").write_text(json.dumps({"step": steps, "rows": [[0]]}) + "\n")
    found = compare_strategies.stopped(code, run, log, timeout=7)
    assert found == (f"{told}{log}" if told.endswith("see ") else told)


def test_differences_are_the_largest():
    assert compare_strategies.largest_difference([1.0, 2.0, 3.0], [1.0, 2.5, 3.1]) == 0.5
    assert compare_strategies.largest_difference([1.0], [1.0, 2.0]) is None


def test_weights_are_compared_by_tensor_and_relative_to_their_size(tmp_path):
    for name in ("first", "run", "other"):
        (tmp_path / name).mkdir()
    first = {"a": torch.full((4,), 10.0), "b": torch.tensor([1.0]), "zero": torch.zeros(2)}
    save_file(first, tmp_path / "first/model.safetensors")
    save_file({"a": first["a"] + 0.1, "zero": first["zero"]}, tmp_path / "run/model-1.safetensors")
    save_file({"b": torch.tensor([1.5]), "tied": torch.ones(1)}, tmp_path / "run/model-2.safetensors")
    save_file({"a": first["a"]}, tmp_path / "other/model.safetensors")
    assert compare_strategies.weights_difference(tmp_path / "run", tmp_path / "first") == pytest.approx(0.5)
    assert compare_strategies.weights_difference(tmp_path / "other", tmp_path / "first") is None


def finished(run, **more):
    names = dict(zip(("mode", "strategy", "processes"), run.split("-"), strict=True))
    speed = {"rows_per_second": 3.14159, "seconds": 12.0, "losses": [2.0, 1.0], "grad_norms": [1.0, 1.0]}
    return {"run": run, "outcome": "ok", **names, "processes": int(names["processes"]), **speed, **more}


REFUSED = {
    **finished("full-fsdp2-2"),
    "outcome": "refused: model_name_or_path: it is much too large for anything like this",
}


def test_columns_without_values_are_left_out():
    columns = {"name": ("run", TEXT), "speed": ("rows/s", "{:.1f}"), "mfu": ("MFU", "{:.0%}")}
    assert format_table(
        [{"name": "a", "speed": 12.34}, {"name": "long name", "speed": None}], columns
    ).splitlines() == [
        "| run       | rows/s |",
        "| --------- | -----: |",
        "| a         |   12.3 |",
        "| long name |        |",
    ]


def test_the_table_says_what_was_refused_and_how_a_resume_ended():
    same = dict.fromkeys(CLOSE, 0.0)
    killed = {"outcome": "ok", "steps_done": 3, "resumed_from": 2, **same}
    text = strategy_report.table([finished("full-single-1", resumed=killed), finished("full-ddp-2", **same), REFUSED])
    assert "| full | single   |     1 |   3.14 |" in text
    assert "identical" in text.splitlines()[2]
    assert text.splitlines()[4].rstrip(" |").endswith("refused")
    assert text.endswith("- full-fsdp2-2: " + REFUSED["outcome"])


def test_a_run_is_a_line_of_80_columns():
    failed = {"outcome": "failed: see " + 99 * "x"}
    long = finished("recipe-single-16", loss_difference=1.23e-7, resumed=failed)
    for result in (long, REFUSED, {**long, "outcome": failed["outcome"]}):
        assert len(strategy_report.line(result)) <= 80


def test_curves_are_drawn_for_every_mode(tmp_path):
    results = [finished("lora-single-1"), finished("lora-ddp-2"), finished("full-ddp-2"), REFUSED]
    strategy_report.write_results(tmp_path, results, {"cpu_cores": 2})
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text())["cpu_cores"] == 2


# What the strategies need to agree


def test_only_renamings_that_a_load_used_are_undone():
    used, unused = (SimpleNamespace(was_used=lambda answer=answer: answer) for answer in (True, False))
    model = SimpleNamespace(_weight_conversions=[used, unused])
    forget_unused_renamings(model)
    assert model._weight_conversions == [used]
    forget_unused_renamings(SimpleNamespace())


@pytest.mark.parametrize(
    "strategies", [("ddp", "zero3", "fsdp2"), pytest.param(("zero1", "zero2"), marks=pytest.mark.long)], ids="-".join
)
def test_every_strategy_trains_as_one_process_does(strategies, tmp_path):
    """QLoRA in float32, where one micro-batch or two, one process or two differ in the order of sums alone."""
    words = ["--modes", "qlora", "--fused_kernels", "[patch_embed, lora]"]
    words += ["--strategies", ",".join(("single", *strategies))]
    finished = run_process(SCRIPT, *SHORT, *words, "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stdout
    first, *others = results_of(tmp_path).values()
    assert [other["strategy"] for other in others] == list(strategies)
    for other in others:
        assert all(other[name] < limit for name, limit in CLOSE.items()), {name: other[name] for name in CLOSE}
        assert len(other["losses"]) == 4
        assert other["rows_per_second"] > 0
    assert first["losses"][0] > first["losses"][-1]
    assert max(map(len, finished.stdout.splitlines()[: 1 + len(others)])) <= 80
    assert f"| qlora | {strategies[-1]:<8} |     2 |" in (tmp_path / "results.md").read_text()


@pytest.mark.long
def test_strategies_round_as_one_process_does(tmp_path):
    """In bfloat16, where a rounding more shows in the third digit of a loss, or of the saved adapter.

    Two micro-batches a step, whose sum has one order: another would tip a rounding over after a few steps, sooner on some
    CPUs than on others.
    """
    words = ["--modes", "qlora", "--strategies", "single,zero1,fsdp2", "--bf16", "true", "--dtype", "bfloat16"]
    words += ["--per_device_train_batch_size", "4"]
    finished = run_process(SCRIPT, *FEW_STEPS, *words, "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stdout
    _, *others = results_of(tmp_path).values()
    assert len(others) == 2
    for other in others:
        assert all(other[name] < limit for name, limit in CLOSE.items()), {name: other[name] for name in CLOSE}


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_under_fsdp2_learns_the_head_too(tied, tmp_path):
    """As the 7B's, a head of its own has a gradient of its own, which is the sum over all processes."""
    words = ["--modes", "full", "--strategies", "single,fsdp2", "--learning_rate", "2e-4", "--output_dir", tmp_path]
    if not tied:
        untied = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
        make_random_model(str(tiny.MODEL_DIR), tmp_path / "model", dtype="float32", overrides=untied)
        assert any("lm_head" in name for name in load_file(tmp_path / "model/model.safetensors"))
        words += ["--model_name_or_path", tmp_path / "model"]
    finished = run_process(SCRIPT, *SHORT, *words)
    assert finished.returncode == 0, finished.stdout
    split = results_of(tmp_path)["full-fsdp2-2"]
    assert all(split[name] < limit for name, limit in CLOSE.items()), {name: split[name] for name in CLOSE}
    assert not list((tmp_path / "runs/full-fsdp2-2").glob("*.safetensors"))


@pytest.mark.long
def test_layers_that_train_in_full_beside_an_adapter_do_so_under_every_strategy(tmp_path):
    words = ["--modes", "lora", "--strategies", "single,ddp,zero3,fsdp2", "--lora_modules_to_save", "[norm, merger]"]
    finished = run_process(SCRIPT, *SHORT, *words, "--keep_models", "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stdout
    _, *others = results_of(tmp_path).values()
    assert [other["strategy"] for other in others] == ["ddp", "zero3", "fsdp2"]
    for other in others:
        assert all(other[name] < limit for name, limit in CLOSE.items()), {name: other[name] for name in CLOSE}
    start = load_file(tiny.MODEL_DIR / "model.safetensors")
    for run in (tmp_path / "runs").iterdir():
        saved = load_file(run / "adapter_model.safetensors")
        for name in ("language_model.norm.weight", "visual.merger.mlp.2.weight"):
            first = start[name.replace("language_model", "model")]
            assert (saved[f"base_model.model.model.{name}"] - first).abs().max() > 1e-3, f"{run.name}: {name}"


FAKE = """
import json, pathlib, sys, time
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
run = pathlib.Path(given["--output_dir"])
what = json.loads(pathlib.Path(given["--recipe"]).read_text())["what"]
run.mkdir(parents=True, exist_ok=True)
if what == "refused":
    print("error: it is too small. Make it larger.")
    sys.exit(2)
if what == "sleeps":
    time.sleep(60)
if "--save_steps" in given and "--resume_from_checkpoint" not in given and "killed" in run.name:
    (run / "row_ids-0.jsonl").write_text(json.dumps({"step": 3, "rows": [[0]]}))
    (run / "checkpoint-2").mkdir()
    (run / "checkpoint-2/complete.json").write_text("{}")
    time.sleep(60)
steps = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "rows_per_second": step} for step in (1, 2, 3, 4)]
(run / "training_log.jsonl").write_text("".join(json.dumps(step) + chr(10) for step in steps))
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Runs a stand-in for scripts/sft.py, one process at a time."""
    script = tmp_path / "sft.py"
    script.write_text(FAKE)
    monkeypatch.setattr(compare_strategies, "script", lambda name: script)
    recipes = {}
    for what in ("good", "refused", "sleeps"):
        recipes[what] = tmp_path / f"{what}.yaml"
        recipes[what].write_text(json.dumps({"what": what}))
    return compare_strategies.Experiment(
        tmp_path / "out", recipes, on_cpu=True, warmup=1, timeout=PROCESS_TIMEOUT, kill_step=2
    )


def test_a_refusal_or_a_hanging_run_costs_the_others_nothing(experiment, monkeypatch):
    run_case = compare_strategies.Experiment._run_case

    def hurried(self, case, first):
        return run_case(replace(self, timeout=1) if case.mode == "sleeps" else self, case, first)

    # The others may be slow to start.
    monkeypatch.setattr(compare_strategies.Experiment, "_run_case", hurried)
    experiment.folder.mkdir()
    results = list(experiment.run([Case("single", 1, what) for what in ("refused", "sleeps", "good")]))
    log = experiment.folder / "sleeps-single-1.log"
    told = [result["outcome"] for result in results]
    assert told == ["refused: it is too small", f"failed: not done after 1 s; see {log}", "ok"]
    assert (results[2]["rows_per_second"], results[2]["counted_steps"]) == (3, 3)


def test_a_run_is_killed_after_its_checkpoint_and_resumed(experiment):
    experiment.folder.mkdir()
    (result,) = experiment.run([Case("single", 1, "good")])
    resumed = result["resumed"]
    assert (resumed["outcome"], resumed["steps_done"], resumed["resumed_from"]) == ("ok", 3, 2)
    assert (resumed["loss_difference"], resumed["grad_norm_difference"]) == (0, 0)


def names(process, script):
    """Whether a script stands in the command line of a process that is still there."""
    try:
        return any(word.endswith(script) for word in process.cmdline())
    except psutil.Error:
        return False


def test_nothing_is_left_running_when_the_script_is_stopped(tmp_path):
    endless = [word if word != "4" else "4000" for word in SHORT]
    command = [sys.executable, SCRIPT, *endless, "--strategies", "ddp", "--output_dir", str(tmp_path / "out")]
    # Tests that run in the background of a shell are deaf to Ctrl-C, and so would be what they start.
    deaf = signal.signal(signal.SIGINT, signal.default_int_handler)
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        script = Popen(command, cwd=REPOSITORY, stdout=output, stderr=output)
    signal.signal(signal.SIGINT, deaf)
    deadline = time.monotonic() + PROCESS_TIMEOUT
    workers: list[psutil.Process] = []
    trainers = 0
    while trainers < 3:  # the launcher and two processes
        assert script.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        below = psutil.Process(script.pid).children(recursive=True)
        # Those that wait to be forked end a moment after the process that they belong to.
        workers = [worker for worker in below if not names(worker, "warm_python.py")]
        trainers = sum(names(worker, "scripts/sft.py") for worker in workers)
        time.sleep(0.1)
    script.send_signal(signal.SIGINT)
    assert script.wait(timeout=PROCESS_TIMEOUT) == 128 + signal.SIGINT
    assert still_there(workers, within=60) == []


def test_a_case_is_named_by_what_it_is():
    assert Case("zero1", 4, "recipe").name == "recipe-zero1-4"
