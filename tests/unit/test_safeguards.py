"""The pieces of a trainer by themselves: what a step, a checkpoint and an evaluation that is due need of it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from qwen_vl_sft.checkpointing import checkpoints, writer
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.manifest import MANIFEST, read_manifest
from qwen_vl_sft.checkpointing.run_folder import finish
from qwen_vl_sft.checkpointing.writer import CheckpointWriter
from qwen_vl_sft.distributed.allocator import VARIABLES, use_growing_segments
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.resilience.due_evaluation import DueEvaluation
from qwen_vl_sft.resilience.step_guard import MOST_SKIPPED, StepGuard
from qwen_vl_sft.training.plan import outcome
from qwen_vl_sft.training.safeguards import make_safeguards

CPU = torch.device("cpu")
ALONE = SimpleNamespace(mixed_precision="no", wait_for_everyone=lambda: None, reduce=lambda value, reduction: value)
SIGNATURE = {"world": {"strategy": "single", "processes": 1}, "same": {"seed": 1}}


def write(one, step, told=None, best=None):
    """Write a checkpoint of nothing but the names of files that a resume looks for."""

    def save():
        for name in ("trainer_state.json", "scheduler.pt", "optimizer.pt", "model.safetensors", "rng_state.pth"):
            (checkpoints.folder_of(one.run, step) / name).write_text(json.dumps({"global_step": step}))

    def report(doing, number):
        (told if told is not None else []).append((doing, number))

    one.write(step, ALONE, True, save, lambda: {"so_far": {"seconds": 3.0}}, lambda: best, report)


def test_a_checkpoint_holds_the_signature_and_what_the_trainer_tells(tmp_path):
    one, told = CheckpointWriter(tmp_path, SIGNATURE, keep=None), []
    assert one.newest() is None
    write(one, 2, told)
    assert read_manifest(tmp_path / "checkpoint-2") == {**SIGNATURE, "so_far": {"seconds": 3.0}}
    assert (one.newest(), one.newest_own_step) == (tmp_path / "checkpoint-2", 2)
    assert one.longest_seconds > 0
    assert [number for _, number in told] == [0, 1, 2]
    found = checkpoints.find(tmp_path, "latest", print)
    assert (found.step, found.totals, found.evaluation_due) == (2, {"seconds": 3.0}, False)


def test_the_best_checkpoint_outlives_those_that_are_kept(tmp_path):
    one = CheckpointWriter(tmp_path, SIGNATURE, keep=1)
    for step in (2, 4, 6):
        write(one, step, best=str(tmp_path / "checkpoint-2"))
    assert [folder.name for folder in checkpoints.with_manifest(tmp_path)] == ["checkpoint-2", "checkpoint-6"]


def test_a_disk_that_is_full_leaves_nothing_half(tmp_path, monkeypatch):
    one = CheckpointWriter(tmp_path, SIGNATURE, keep=None)
    write(one, 2)

    def full(folder, entries):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_manifest", full)
    with pytest.raises(UserError, match=r"No space left on device\. The last good checkpoint is .*checkpoint-2"):
        write(one, 4)
    assert not (tmp_path / "checkpoint-4").exists()
    assert one.newest_own_step == 2
    assert (tmp_path / "checkpoint-2" / MANIFEST).is_file()


def test_a_step_that_is_not_finite_is_left_out_only_where_that_is_asked(monkeypatch):
    monkeypatch.setattr("qwen_vl_sft.resilience.faults.gather_object", lambda parts: parts)
    for skips in (False, True):
        guard = StepGuard(CPU, skips)
        guard.begin([[3], [5, 7]])
        assert (guard.next_rows(), guard.row_ids()) == ([3], [3, 5, 7])
        assert guard.note_loss(torch.tensor(1.0)) == 1
        assert guard.next_rows() == [5, 7]
        assert torch.isnan(guard.note_loss(torch.tensor(float("nan")))) == (not skips)
        assert guard.should_skip(4, 1.0, ALONE) == skips
        assert guard.skipped == (
            ["step 4: the loss of row(s) 5, 7 is NaN or infinite. The rows (row_id) of the step: 3, 5, 7"]
            if skips
            else []
        )
        with pytest.raises(UserError, match=r"row\(s\) 5, 7 is NaN or infinite.* set nonfinite: skip"):
            guard.stop(4, guard.record)
        guard.begin([[9]])
        guard.note_loss(torch.tensor(2.0))
        assert not guard.should_skip(5, 1.0, ALONE)


def test_skipped_steps_leave_the_mean_and_end_the_run_when_they_go_on(monkeypatch):
    monkeypatch.setattr("qwen_vl_sft.resilience.faults.gather_object", lambda parts: parts)
    guard, nan = StepGuard(CPU, skips=True), float("nan")

    def step(number, *losses):
        guard.begin([[row] for row in range(len(losses))])
        counted = sum(guard.note_loss(torch.tensor(loss)).item() for loss in losses)
        guard.should_skip(number, 1.0, ALONE)
        return counted

    total = step(1, 1.0, 2.0) + step(2, 4.0, nan) + step(3, 6.0)
    assert guard.mean_loss(total / 3, 3) == pytest.approx(4.5)
    assert guard.mean_loss(7.0, 1) == 7.0
    assert guard.skipped_loss == 4.0
    step(4, nan)
    assert math.isnan(guard.mean_loss(0.0, 1))
    step(5, 1.0)
    for number in range(MOST_SKIPPED - 1):
        step(6 + number, nan)
    with pytest.raises(UserError, match="the last of 16 steps in a row that nonfinite: skip skipped"):
        step(30, nan)


def test_a_number_that_is_not_finite_is_null(tmp_path):
    finish(tmp_path, {"eval_loss": math.nan, "data": {"sizes": [1.5, math.inf]}}, [{"loss": math.nan, "step": 3}])
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"eval_loss": None, "data": {"sizes": [1.5, None]}}
    assert json.loads((tmp_path / "training_log.jsonl").read_text()) == {"loss": None, "step": 3}


def test_an_evaluation_is_due_until_it_is_taken():
    by_epoch = SimpleNamespace(eval_strategy="epoch", eval_delay=0)
    evaluations, state = DueEvaluation(by_epoch, due=True), SimpleNamespace(epoch=1.0, global_step=4, max_steps=8)
    assert evaluations.take_pending()
    assert not evaluations.take_pending()
    assert evaluations.comes_at_epoch_end(state)
    assert not evaluations.comes_at_epoch_end(SimpleNamespace(epoch=1.5, global_step=6, max_steps=8))
    evaluations.note(4)
    assert not evaluations.comes_at_epoch_end(state)
    evaluations.postpone()
    assert evaluations.due
    assert not DueEvaluation(SimpleNamespace(eval_strategy="no", eval_delay=0), due=True).take_pending()


def test_a_checkpoint_of_another_folder_is_none_of_the_run(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), world_size=1, process_index=0, ddp_timeout=60, device=CPU)
    args.save_total_limit = 2
    for folder, own in (("run", 4), ("other", 0)):
        resume = Checkpoint(tmp_path / folder / "checkpoint-4", 4, {"evaluation_due": True, "so_far": {"seconds": 2.0}})
        pieces = make_safeguards(args, SIGNATURE, resume)
        assert (pieces.writer.newest_own_step, pieces.writer.keep) == (own, 2)
        assert (pieces.evaluations.due, pieces.totals) == (True, {"seconds": 2.0})
    assert make_safeguards(args).writer.signature == {"world": {"processes": 1}}


@pytest.mark.parametrize("stated", [None, *VARIABLES])
def test_segments_grow_where_nothing_else_is_said_and_a_driver_is_there(stated, tmp_path):
    environment = {} if stated is None else {stated: "backend:native"}
    use_growing_segments(environment, driver=tmp_path / "none")
    assert environment == ({} if stated is None else {stated: "backend:native"})
    use_growing_segments(environment, driver=tmp_path)
    assert environment == {
        stated or "PYTORCH_CUDA_ALLOC_CONF": "backend:native" if stated else "expandable_segments:True"
    }


def test_a_run_whose_steps_were_all_left_out_has_no_loss(tmp_path):
    none = {"skipped_while_training": 0, "skipped_while_evaluating": 0, "failed_loggers": {}, "data": {"train": {}}}
    metrics = {**none, "steps": 3, "step_of_weights": 3, "skipped_steps": 3, "train_loss": math.nan}
    assert outcome(metrics, tmp_path).splitlines()[0] == "finished    3 steps, training loss none (not finite)"
    metrics["train_loss"] = 1.23456
    assert outcome(metrics, tmp_path).splitlines()[0] == "finished    3 steps, training loss 1.2346"
