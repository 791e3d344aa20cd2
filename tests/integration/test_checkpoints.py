"""Which checkpoints a run goes on from, and that it goes on exactly: kill -9, damage, other worlds, a full disk."""

import json
import runpy
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import TrainerState, TrainingArguments

from fixtures.models import qwen2_vl
from fixtures.processes import Popen, launch, run_process
from fixtures.repository import REPOSITORY
from fixtures.trainers import make_trainer
from qwen_vl_sft import errors, tiny
from qwen_vl_sft.checkpointing import checkpoints, manifest, resume_check, writer
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.manifest import MANIFEST
from qwen_vl_sft.checkpointing.resumed_state import correct_state, take_schedule
from qwen_vl_sft.checkpointing.rotation import rename_abandoned, rotate
from qwen_vl_sft.checkpointing.row_log import RowLog, forget_after, read_row_log
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import EXIT_USER_ERROR, UserError
from qwen_vl_sft.modeling.base_identity import identity_of_base
from qwen_vl_sft.resilience import step_log, stopping
from qwen_vl_sft.tools import kill_and_resume
from qwen_vl_sft.tools.kill_and_resume import Experiment
from qwen_vl_sft.training import run_signature

SCRIPT = "scripts/sft.py"
ABOUT = {
    "world": {"strategy": "single", "processes": 1},
    "same": {"global_batch_size": 4, "seed": 1, "rows": 8, "data": "a"},
    "schedule": {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": None, "warmup_steps": 0},
    "judge": {"metric_for_best_model": "loss", "evaluation": "e"},
    "versions": {"torch": "2"},
}


def write_checkpoint(run: Path, step: int, processes: int = 1, mark: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    names = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt"]
    names += ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in names:
        (folder / name).write_bytes(b"x" * 100)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if mark:
        about = {**ABOUT, "world": {"strategy": "ddp" if processes > 1 else "single", "processes": processes}}
        manifest.write_manifest(folder, about)
    return folder


def latest(run: Path) -> tuple[int | None, list[str]]:
    told: list[str] = []
    found = checkpoints.find(run, "latest", told.append)
    return (found.step if found else None), told


# Which checkpoint


def test_the_newest_whole_checkpoint_by_steps(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert latest(tmp_path) == (100, [])


def truncate(folder):
    (folder / "optimizer.pt").write_bytes(b"x" * 50)


def flip(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 99 + b"y")


DAMAGE = {
    "no mark": (lambda folder: (folder / MANIFEST).unlink(), "complete.json is missing"),
    "mark cut off": (lambda folder: (folder / MANIFEST).write_text('{"files": {'), "complete.json cannot be read"),
    "mark of nothing": (lambda folder: (folder / MANIFEST).write_text("[]"), "complete.json cannot be read"),
    "file cut off": (truncate, "optimizer.pt has 50 bytes, not 100"),
    "file gone": (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "file changed": (flip, "adapter_model.safetensors is not what was written"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(name, tmp_path):
    damage, told = DAMAGE[name]
    write_checkpoint(tmp_path, 4)
    damage(write_checkpoint(tmp_path, 8))
    step, messages = latest(tmp_path)
    assert step == 4
    assert len(messages) == 1
    assert messages[0].startswith("skipped ")
    assert "checkpoint-8: " in messages[0]
    assert told in messages[0]
    if name != "no mark":
        with pytest.raises(UserError, match=r"cannot resume from .*checkpoint-8: .*latest"):
            checkpoints.find(tmp_path, str(tmp_path / "checkpoint-8"), messages.append)


def test_without_a_mark_a_named_checkpoint_must_have_all_its_files(tmp_path):
    folder, told = write_checkpoint(tmp_path, 8, mark=False), []
    assert checkpoints.find(tmp_path, str(folder), told.append) == Checkpoint(folder, 8, {})
    assert "its files are all there, but cannot be checked for damage" in told[0]
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors"):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(UserError, match=r"it holds no"):
            checkpoints.find(tmp_path, str(folder), told.append)
        (tmp_path / name).rename(folder / name)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state_1.pth"])
def test_what_was_never_saved_is_not_reset_in_silence(name, tmp_path):
    """A process whose part is on another machine's disk, under a mark that is right by itself."""
    folder = write_checkpoint(tmp_path, 8, processes=2)
    manifest.check_all_files_visible(folder, 2)
    (folder / name).unlink()
    manifest.write_manifest(folder, {**ABOUT, "world": {"strategy": "ddp", "processes": 2}})
    assert f"it holds no {name}" in manifest.problem_of(folder)


def test_a_part_that_is_seen_late_is_waited_for(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 8, processes=2, mark=False)
    late = folder / "rng_state_1.pth"
    late.unlink()
    monkeypatch.setattr(manifest.time, "sleep", lambda seconds: late.write_bytes(b"x"))
    manifest.check_all_files_visible(folder, 2)


def test_without_all_parts_there_is_no_mark_and_nothing_is_changed(ragged, tiny_processor, tmp_path, monkeypatch):
    """The other process has written its part on a disk of its own."""
    write_checkpoint(tmp_path / "run", 100)
    monkeypatch.setattr(manifest, "_SECONDS_TO_SEE", 0.0)
    keys = {"save_strategy": "steps", "save_steps": 1}
    signature = {**ABOUT, "world": {"strategy": "ddp", "processes": 2}}
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, signature=signature, **keys)
    with pytest.raises(
        UserError, match=r"it holds no rng_state_0.pth, .*, so no run .* storage that all machines share"
    ):
        trainer.train()
    assert names(tmp_path / "run")[:2] == ["checkpoint-1", "checkpoint-100"]
    assert "model.safetensors" in names(tmp_path / "run/checkpoint-1")
    assert latest(tmp_path / "run")[0] == 100


def test_a_run_without_a_whole_checkpoint_starts_anew(tmp_path):
    assert latest(tmp_path) == (None, [])
    write_checkpoint(tmp_path, 4, mark=False)
    step, told = latest(tmp_path)
    assert step is None
    assert told[0].startswith("skipped ")
    assert "checkpoint-4: " in told[0]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_rotation_keeps_the_newest_and_the_best_and_drops_halves(tmp_path):
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 5, mark=False)
    newest = tmp_path / "checkpoint-8"
    rotate(tmp_path, None, newest, None)
    assert len(checkpoints.folders(tmp_path)) == 5
    rotate(tmp_path, 2, newest, str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    rotate(tmp_path, 1, newest, None)
    assert names(tmp_path) == ["checkpoint-8"]


def test_rotation_never_takes_what_was_just_written(tmp_path):
    flip(write_checkpoint(tmp_path, 100))
    rotate(tmp_path, 1, write_checkpoint(tmp_path, 60), None)
    assert names(tmp_path) == ["checkpoint-60"]


def test_what_a_run_has_left_is_kept_where_latest_does_not_look(tmp_path):
    for step in (50, 80, 100):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 90, mark=False)
    new, told = write_checkpoint(tmp_path, 60), []
    rename_abandoned(tmp_path, 50, new, told.append)
    rename_abandoned(tmp_path, 50, new, told.append)
    assert names(tmp_path) == [
        "abandoned-checkpoint-100",
        "abandoned-checkpoint-80",
        "checkpoint-50",
        "checkpoint-60",
        "checkpoint-90",
    ]
    assert latest(tmp_path)[0] == 60
    assert len(told) == 1
    assert "resumed from step 50" in told[0]
    assert "abandoned-checkpoint-80, abandoned-checkpoint-100" in told[0]
    write_checkpoint(tmp_path, 80)
    rename_abandoned(tmp_path, 60, new, told.append)
    assert "abandoned-checkpoint-80-2" in names(tmp_path)


class Killed(BaseException):
    """Stands for the end of a process."""


def test_a_run_that_went_back_is_never_without_a_checkpoint_of_its_own(ragged, tiny_processor, tmp_path, monkeypatch):
    """It is killed between the files and the mark of its first checkpoint, then starts again."""
    run = tmp_path / "run"
    for step in (2, 100):
        write_checkpoint(run, step)

    def train():
        keys = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
        make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, **keys).train()

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_manifest", killed)
        with pytest.raises(Killed):
            train()
    assert latest(run) == (
        None,
        [f"skipped {run}/checkpoint-1: it was not written to its end ({MANIFEST} is missing)"],
    )
    train()
    assert latest(run) == (2, [])
    assert names(run)[:3] == ["abandoned-checkpoint-100", "abandoned-checkpoint-2", "checkpoint-2"]


def test_an_earlier_attempt_at_the_same_step_makes_room(ragged, tiny_processor, tmp_path):
    write_checkpoint(tmp_path / "run", 2)
    make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, save_strategy="steps", save_steps=2).train()
    assert latest(tmp_path / "run") == (2, [])
    assert (tmp_path / "run/abandoned-checkpoint-2/optimizer.pt").stat().st_size == 100


# What follows a checkpoint

EPOCHS = {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("last", [1, 3])
def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(last, ragged, tiny_processor, tmp_path):
    """It follows the checkpoint of an epoch's last step; an epoch is one step here."""

    def make(resume=None):
        return make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, resume=resume, **EPOCHS, max_steps=3)

    def evaluations(trainer, resume=None):
        trainer.train(resume_from_checkpoint=resume)
        return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]

    wanted = evaluations(make())
    shutil.rmtree(tmp_path / "run")
    trainer = make()
    evaluate = trainer.evaluate

    def dies(*args, **kwargs):
        if trainer.state.global_step == last:
            raise Killed
        return evaluate(*args, **kwargs)

    trainer.evaluate = dies
    with pytest.raises(Killed):
        evaluations(trainer)
    checkpoint = checkpoints.find(tmp_path / "run", "latest", print)
    assert checkpoint.step == last
    assert evaluations(make(checkpoint), str(checkpoint.path)) == wanted


@pytest.mark.parametrize(
    ("keys", "due"),
    [
        ({"max_steps": 3}, [False, True, True]),  # an epoch is two steps; the last step ends the run
        ({"max_steps": 2, "eval_delay": 1.5}, [False, False]),
        ({"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}, [False, False]),
    ],
)
def test_a_mark_tells_an_evaluation_that_is_still_to_come(keys, due, ragged, tiny_processor, tmp_path):
    arguments = {**EPOCHS, "per_device_train_batch_size": 3, **keys}
    make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, **arguments).train()
    marks = [json.loads((folder / MANIFEST).read_text()) for folder in checkpoints.folders(tmp_path / "run")]
    assert [mark["evaluation_due"] for mark in marks] == due


def test_an_evaluation_that_is_due_is_left_out_where_none_is_wanted(ragged, tiny_processor, tmp_path):
    due = Checkpoint(tmp_path / "run/checkpoint-0", 0, {"evaluation_due": True})
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, resume=due, max_steps=1)
    trainer.eval_dataset = None
    assert trainer.evaluations.due
    trainer.train()
    assert not trainer.evaluations.due


def test_what_a_mark_does_not_tell_is_not_averaged_over(ragged, tiny_processor, tmp_path):
    """Twice resumed: the first time from a checkpoint that does not tell its losses."""
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, **keys)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]

    def resume(step, so_far):
        resumed = Checkpoint(tmp_path / f"run/checkpoint-{step}", step, {"so_far": so_far})
        trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, resume=resumed, **keys)
        trainer.train(resume_from_checkpoint=str(resumed.path))
        return trainer

    resume(1, {})
    resumed = resume(3, json.loads((tmp_path / "run/checkpoint-3" / MANIFEST).read_text())["so_far"])
    assert resumed.finished["steps_unknown"] == 1
    assert resumed.finished["loss_sum"] == pytest.approx(sum(losses[1:]), abs=1e-4)
    # The last log is of the whole run too.
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses[1:]) / 3, abs=1e-4)
    assert resumed.state.log_history[-1]["train_runtime"] == pytest.approx(resumed.finished["seconds"], abs=1e-4)


# Which run


def written_by(strategy, processes, **same):
    context = {"strategy": strategy, "processes": processes}
    return {**ABOUT, "world": context, "same": {**ABOUT["same"], **same}}


def check(was, now, dropout=0.0):
    return resume_check.check(Checkpoint(Path("run/checkpoint-8"), 8, was), now, dropout)


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (("single", 1), ("ddp", 2), "continues with 2 process(es) (ddp)"),
        (("ddp", 4), ("ddp", 2), "continues with 2 process(es) (ddp)"),
        (("fsdp2", 2), ("fsdp2", 4), "the same rows in the same steps"),
    ],
)
def test_another_number_of_processes_is_noted(was, now, words):
    (note,) = check(written_by(*was), written_by(*now))
    assert words in note
    assert "agree up to rounding" in note
    assert "dropout draws other random numbers" in check(written_by(*was), written_by(*now), dropout=0.1)[0]
    assert check(written_by(*was), written_by(*was)) == []


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        (("zero3", 2), ("zero3", 1), "the optimizer is saved in parts"),
        (("zero2", 2), ("zero3", 2), "the files differ"),
        (("single", 1), ("zero2", 2), "the files differ"),
        (("fsdp2", 2), ("ddp", 2), "the files differ"),
    ],
)
def test_worlds_that_cannot_go_on_are_refused_with_the_reason(was, now, why):
    with pytest.raises(UserError, match=why):
        check(written_by(*was), written_by(*now))


def test_every_difference_is_told_at_once():
    with pytest.raises(UserError) as error:
        check(written_by("ddp", 2), written_by("ddp", 2, global_batch_size=8, seed=2, rows=9, data="b"))
    assert len(error.value.problems) == 4
    assert "has global_batch_size 4, this run 8; set it back" in str(error.value)
    assert "was trained on 8 rows, now 9" in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("load_in_fp8", True), ("fp8_gradients", True), ("train_router", True)])
def test_what_stands_in_a_mark_only_where_it_is_set_is_compared_too(name, value):
    with_it, without = written_by("single", 1, **{name: value}), written_by("single", 1)
    assert check(with_it, with_it) == []
    for was, now, words in (
        (with_it, without, f"{name} True, this run False"),
        (without, with_it, f"{name} False, this"),
    ):
        with pytest.raises(UserError, match=f"has {words}.*; set it back"):
            check(was, now)


def test_the_same_base_in_other_files_is_noted_and_another_base_refused(tmp_path):
    def based(base, weights):
        return {**written_by("single", 1, base=base), "base_weights": weights}

    (note,) = check(based("a folder of weights 1", "w"), based("a folder of weights 2", "w"))
    assert "had the base a folder of weights 1; a folder of weights 2 holds the same weights" in note
    for was, now in (("w", "other"), (None, None), ("w", None), (None, "w")):
        with pytest.raises(
            UserError, match="has base a folder of weights 1, this run a folder of weights 2; set it back"
        ):
            check(based("a folder of weights 1", was), based("a folder of weights 2", now))
    # The mark of an earlier version does not tell them; the run folder may.
    former = Checkpoint(tmp_path / "checkpoint-8", 8, written_by("single", 1, base="a folder of weights 1"))
    for environment, same in (({"base": "a folder of weights 1"}, True), ({"base": "a folder of weights 3"}, False)):
        (tmp_path / "environment.json").write_text(json.dumps({**environment, "base_weights": "w"}))
        if same:
            assert len(resume_check.check(former, based("a folder of weights 2", "w"), 0.0)) == 1
        else:
            with pytest.raises(UserError, match="has base"):
                resume_check.check(former, based("a folder of weights 2", "w"), 0.0)


def scheduled(**keys):
    return {**ABOUT, "schedule": {**ABOUT["schedule"], **keys}}


def test_another_learning_rate_or_schedule_of_steps_is_noted():
    now = scheduled(learning_rate=1e-4, lr_scheduler_type="linear")
    rate = "run/checkpoint-8 had learning_rate 0.0002; the run continues with 0.0001"
    assert check(ABOUT, now) == [
        rate,
        "run/checkpoint-8 had lr_scheduler_type cosine; the run continues with linear",
    ]


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_evaluations_is_that_of_the_checkpoint(kind):
    """Its state is of no use to another one, and brings what the recipe says otherwise."""
    follows = scheduled(lr_scheduler_type=kind)
    assert check(follows, follows) == []
    for was, now in ((ABOUT, follows), (follows, ABOUT)):
        with pytest.raises(UserError, match=f"has lr_scheduler_type .*{kind}.*; set it back"):
            check(was, now)
    with pytest.raises(UserError, match=r"has learning_rate 0\.0002, this run 0\.0001; set it back"):
        check(follows, scheduled(lr_scheduler_type=kind, learning_rate=1e-4))
    with pytest.raises(
        UserError, match=f"evaluated on other rows or by another metric, which lr_scheduler_type {kind}"
    ):
        check(follows, {**follows, "judge": {**ABOUT["judge"], "evaluation": "other"}})


def test_a_mark_of_an_earlier_version_is_compared_as_far_as_it_goes():
    same = {**ABOUT["same"], "optim": "adamw_torch", "cache_image_features": None}
    was = {name: ABOUT[name] for name in ("world", "same", "versions")}
    (note,) = check({**was, "learning_rate": 2e-4}, {**ABOUT, "same": same})
    unknown = "lr_scheduler_kwargs, lr_scheduler_type, optim, warmup_steps, metric_for_best_model, evaluation"
    assert note == f"run/checkpoint-8 does not record its {unknown}: check that they are unchanged"
    with pytest.raises(UserError, match="has cache_image_features None, this run int8"):
        check(was, {**ABOUT, "same": {**same, "cache_image_features": "int8"}})


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_run_goes_on_with_its_own_peak_and_schedule_where_it_was(name):
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    def steps(rate, count, schedule=get_linear_schedule_with_warmup):
        weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
        optimizer = torch.optim.AdamW([{"params": [one]} for one in weights], lr=rate)
        scheduler = schedule(optimizer, 3, 20)
        for _ in range(count):
            optimizer.step()
            scheduler.step()
        return optimizer, scheduler

    before = get_linear_schedule_with_warmup if name == "linear" else get_cosine_schedule_with_warmup
    saved, (optimizer, scheduler), (_, wanted) = steps(2e-3, 7, before), steps(1e-3, 0), steps(1e-3, 7)
    optimizer.load_state_dict(saved[0].state_dict())
    scheduler.load_state_dict(saved[1].state_dict())
    assert scheduler.get_last_lr() == saved[1].get_last_lr()
    take_schedule(optimizer, scheduler, 1e-3)
    for _ in range(5):
        assert scheduler.get_last_lr() == pytest.approx(wanted.get_last_lr(), rel=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
        wanted.optimizer.step()
        wanted.step()


@pytest.mark.parametrize("there", [True, False])
def test_the_best_checkpoint_until_then_is_the_one_beside_it(there, tmp_path, capsys):
    """The path in the file is where the run folder was when it was written."""
    run = tmp_path / "moved"
    best, newest = write_checkpoint(run, 2, mark=there), write_checkpoint(run, 4)
    state = TrainerState(best_model_checkpoint="runs/former/checkpoint-2", best_metric=0.5, best_global_step=2)
    state.save_to_json(str(newest / "trainer_state.json"))
    checkpoint = Checkpoint(newest, 4, {}, resume_check._best(Checkpoint(newest, 4, {})))
    arguments = TrainingArguments(str(run), save_steps=7, use_cpu=True)
    arguments.load_best_model_at_end = True
    correct_state(state, arguments, checkpoint)
    assert state.save_steps == 7
    if there:
        assert (state.best_model_checkpoint, state.best_metric, state.best_global_step) == (str(best), 0.5, 2)
    else:
        assert (state.best_model_checkpoint, state.best_metric, state.best_global_step) == (None, None, None)
    assert ("the best so far: it was not written to its end" in capsys.readouterr().err) != there


def test_a_mark_tells_by_what_the_best_was_found():
    def judge(**keys):
        return run_signature._judge(read_recipe(None, keys), None)

    assert judge() == judge(metric_for_best_model="eval_loss") == {"metric_for_best_model": "loss", "evaluation": None}
    answers = judge(metric_for_best_model="relaxed_accuracy", max_predict_samples=9)
    assert (answers["max_predict_samples"], answers["max_new_tokens"]) == (9, 64)
    # Of an earlier version, in the recipe and in the mark.
    renamed = judge(metric_for_best_model="eval_strict_relaxed_accuracy")
    assert renamed["metric_for_best_model"] == "normalised_relaxed_accuracy"
    former = {**ABOUT, "judge": {**renamed, "metric_for_best_model": "strict_relaxed_accuracy"}}
    assert resume_check._same_metric_and_eval_rows(Checkpoint(Path("run/checkpoint-4"), 4, former), {"judge": renamed})


@pytest.mark.parametrize("loads_best", [True, False])
def test_the_best_by_another_metric_or_on_other_rows_does_not_count(loads_best):
    now = {**ABOUT, "judge": {**ABOUT["judge"], "metric_for_best_model": "relaxed_accuracy"}}
    checkpoint = Checkpoint(Path("run/checkpoint-4"), 4, ABOUT)
    assert resume_check._same_metric_and_eval_rows(checkpoint, ABOUT)
    assert not resume_check._same_metric_and_eval_rows(checkpoint, now)
    state = TrainerState(best_model_checkpoint="run/checkpoint-2", best_metric=0.5, best_global_step=2)
    arguments = TrainingArguments("run", use_cpu=True)
    arguments.load_best_model_at_end = loads_best
    correct_state(state, arguments, replace(checkpoint, same_metric_and_eval_rows=False))
    assert (state.best_model_checkpoint, state.best_metric, state.best_global_step) == (None, None, None)


def test_a_base_model_is_known_by_its_weights_wherever_it_lies(tmp_path):
    def identity(folder):
        return identity_of_base(ModelSettings(model_name_or_path=str(folder)))

    one, moved, other = (tmp_path / name for name in ("one", "moved", "other"))
    for folder in (one, moved, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(10_000_000))
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"x" * 200_000)
    assert identity(one) == identity(moved) != identity(other)
    (moved / "config.json").write_text('{"layers": 2}')
    assert identity(one) != identity(moved)


# The log of rows


def test_the_log_of_rows_reads_as_the_epoch_does_and_forgets_what_was_lost(tmp_path):
    for rank in (0, 1):
        log = RowLog(tmp_path, rank)
        for step in (1, 2):
            log.write(step, [[10 * step + rank], [10 * step + 2 + rank]])
    assert read_row_log(tmp_path) == {1: [10, 11, 12, 13], 2: [20, 21, 22, 23]}
    with (tmp_path / "row_ids-0.jsonl").open("a") as file:
        file.write('{"step": 3, "ro')
    forget_after(tmp_path, 1)
    RowLog(tmp_path, 0).write(2, [[7]])
    assert read_row_log(tmp_path) == {1: [10, 11, 12, 13], 2: [7]}


def test_steps_that_were_left_out_are_forgotten_with_what_was_lost(tmp_path):
    (tmp_path / step_log.SKIPPED).write_text('{"step": 2, "why": "a"}\n{"step": 5, "why": "b"}\n')
    stopping.remove_leftovers_of_stopped_run(tmp_path, 4)
    assert step_log.skipped_steps(tmp_path) == 1


# Real runs


def words(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


SHORT = {
    "recipe": "recipes/quickstart.yaml",
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "no",
    "load_best_model_at_end": "false",
    "predict_with_generate": "false",
    "max_train_samples": 20,
    "per_device_train_batch_size": 1,
    "global_batch_size": 4,
    "logging_steps": 1,
    "report_to": "none",
    "log_row_ids": "true",
}


def logged(run, name="loss"):
    entries = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


def figures(run):
    """What a run has come to, but for the clock."""
    metrics = json.loads((run / "metrics.json").read_text())
    return {name: metrics[name] for name in ("steps", "epochs", "train_loss", "work", "skipped_while_training")}


@pytest.fixture(scope="module")
def single_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "single"
    finished = run_process(SCRIPT, *words({**SHORT, "output_dir": run}))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run


def test_two_processes_go_on_from_one_with_the_same_rows_and_losses(single_run, tmp_path):
    run = tmp_path / "two"
    shutil.copytree(single_run, run)
    # What a kill while it is written leaves behind.
    (run / "checkpoint-6/complete.json").unlink()
    (run / "checkpoint-4/optimizer.pt").write_bytes(b"")
    finished = launch("cpu", SCRIPT, *words({**SHORT, "output_dir": run, "resume_from_checkpoint": "latest"}))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "checkpoint-6: it was not written to its end" in finished.stderr
    assert "checkpoint-4: optimizer.pt has 0 bytes" in finished.stderr
    assert (
        "checkpoint-2 was written by 1 process(es) (single) and continues with 2 process(es) (ddp)" in finished.stderr
    )
    assert read_row_log(run) == read_row_log(single_run)
    assert len((run / "row_ids-1.jsonl").read_text().splitlines()) == 4
    assert not list(run.glob(".seen-by-all-*"))
    # Figures of the whole run, not of what came after the checkpoint; and again when nothing is left to train.
    whole = figures(single_run)
    assert figures(run) == {**whole, "train_loss": pytest.approx(whole["train_loss"], abs=1e-4)}
    trained, began = json.loads((run / "metrics.json").read_text())["train_runtime"], time.monotonic()
    again = run_process(SCRIPT, *words({**SHORT, "output_dir": run, "resume_from_checkpoint": "latest"}))
    assert again.returncode == 0, again.stderr[-3000:]
    assert figures(run) == {**whole, "train_loss": pytest.approx(whole["train_loss"], abs=1e-4)}
    # Of training alone, to which a run that finds nothing left adds next to nothing.
    longer = json.loads((run / "metrics.json").read_text())["train_runtime"] - trained
    assert -0.01 < longer < (time.monotonic() - began) / 2
    assert logged(run) == pytest.approx(logged(single_run), abs=1e-4)


def test_a_run_that_is_taken_back_leaves_its_later_checkpoints(single_run, tmp_path):
    run = tmp_path / "back"
    shutil.copytree(single_run, run)
    keys = {**SHORT, "output_dir": run, "max_steps": 3, "save_total_limit": 1}
    finished = run_process(SCRIPT, *words({**keys, "resume_from_checkpoint": run / "checkpoint-2"}))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert latest(run) == (3, [])
    left = ["abandoned-checkpoint-4", "abandoned-checkpoint-6", "checkpoint-3"]
    assert [name for name in names(run) if "checkpoint-" in name] == left
    assert finished.stderr.count("is kept as abandoned-checkpoint-4, abandoned-checkpoint-6") == 1


def test_other_settings_are_refused_and_nothing_is_changed(single_run, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(tiny.MODEL_DIR, other)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    safetensors.torch.save_file({name: 2 * one for name, one in weights.items()}, other / "model.safetensors")
    keys = {**SHORT, "output_dir": tmp_path / "run", "global_batch_size": 2, "seed": 1, "model_name_or_path": other}
    keys["weight_decay"] = 0.1
    finished = run_process(SCRIPT, *words({**keys, "resume_from_checkpoint": single_run / "checkpoint-2"}))
    assert finished.returncode == EXIT_USER_ERROR
    assert "has global_batch_size 4, this run 2" in finished.stderr
    assert "has seed 42, this run 1" in finished.stderr
    assert "has base a folder of weights " in finished.stderr
    assert "has weight_decay 0.0, this run 0.1; set it back" in finished.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config", ["cpu", *(pytest.param(name, marks=pytest.mark.long) for name in ("zero2", "zero3", "fsdp2"))]
)
def test_a_run_goes_on_with_another_learning_rate_and_other_intervals(config, single_run, tmp_path):
    """The optimizer, the scheduler and the Trainer's state bring those of the run that wrote them."""
    run = tmp_path / "run"
    keys = {**SHORT, "output_dir": run}
    if config == "cpu":
        shutil.copytree(single_run, run)
    else:
        finished = launch(config, SCRIPT, *words(keys))
        assert finished.returncode == 0, finished.stderr[-3000:]
    before = logged(run, "learning_rate")
    shutil.rmtree(run / "checkpoint-6")
    keys |= {"resume_from_checkpoint": "latest", "learning_rate": 8e-4, "save_steps": 1}
    finished = launch(config, SCRIPT, *words(keys))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "checkpoint-4 had learning_rate 0.002; the run continues with 0.0008" in finished.stderr
    assert logged(run, "learning_rate") == pytest.approx(before[:4] + [0.4 * rate for rate in before[4:]])
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 5, 6)}


@pytest.mark.parametrize(("processes", "packing"), [pytest.param(1, True, marks=pytest.mark.long), (2, False)])
def test_a_killed_run_ends_as_one_that_was_not(processes, packing, tmp_path, monkeypatch):
    """The short form of scripts/kill_and_resume.py."""
    monkeypatch.setattr(kill_and_resume.subprocess, "Popen", Popen)
    keys = {**SHORT, "dataloader_num_workers": 1, "save_total_limit": 1}
    keys.pop("log_row_ids")
    if packing:
        keys |= {"packing": "true", "tokens_per_batch": 512, "share_prefixes": "true"}
    trials = Experiment(tuple(words(keys)), processes, tmp_path / "runs").run(kills=1, seed=processes, tell=print)
    assert [trial for trial in trials if not trial.same] == []


@pytest.mark.parametrize(
    ("words", "told"), [(("2", "zero9"), "does not exist"), (("1", "zero3"), "needs several proc")]
)
def test_kills_under_a_strategy_need_its_configuration_and_several_processes(words, told, tmp_path):
    processes, config = words
    command = ("--kills", "1", "--processes", processes, "--config", config, "--output_dir", tmp_path / "runs")
    finished = run_process("scripts/kill_and_resume.py", *command)
    assert finished.returncode == EXIT_USER_ERROR
    assert finished.stderr.startswith(f"error: config: {config} {told}")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--output_dir", "{file}"], "error: --output_dir: {file} cannot be made: it is a file; name another folder"),
        (["--kills", "0"], "error: --kills, --processes: at least 1"),
        (["--processes", "0"], "error: --kills, --processes: at least 1"),
        (
            ["--signal", "SIGFOO"],
            "error: command line: --signal: 'SIGFOO' is not one of SIGKILL, SIGTERM, SIGUSR1, SIGINT",
        ),
    ],
)
def test_kills_that_cannot_be_are_refused(command, told, tmp_path, monkeypatch, capsys):
    def leave(code, message, show=True):
        print(message, file=sys.stderr)
        raise SystemExit(code)

    (tmp_path / "file").touch()
    words = [word.format(file=tmp_path / "file") for word in ["--output_dir", str(tmp_path / "runs"), *command]]
    monkeypatch.setattr(sys, "argv", ["scripts/kill_and_resume.py", *words])
    monkeypatch.setattr(errors, "leave", leave)
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as code:
        runpy.run_path("scripts/kill_and_resume.py", run_name="__main__")
    assert code.value.code == EXIT_USER_ERROR
    assert told.format(file=tmp_path / "file") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_word_that_stands_alone_is_refused(tmp_path):
    finished = run_process("scripts/kill_and_resume.py", "true", "--output_dir", tmp_path / "runs")
    assert finished.returncode == EXIT_USER_ERROR
    assert finished.stderr.startswith("error: command line: 'true' has no key before it")
    assert not (tmp_path / "runs").exists()


def test_what_is_stated_last_wins():
    script = runpy.run_path(str(REPOSITORY / "scripts/kill_and_resume.py"))
    found = script["words_of"](False, {"tf32": [], "list": ["c", "d"], "max_steps": ["3"]})
    assert found[:4] == ["--recipe", "recipes/quickstart.yaml", "--max_steps", "3"]
    assert found[-4:] == ["--tf32", "true", "--list", '["c", "d"]']
    assert len(set(found[::2])) == len(found[::2])
    assert script["words_of"](True, {"recipe": ["other.yaml"]})[1] == "other.yaml"
