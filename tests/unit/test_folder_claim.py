"""Of two runs that start at once in one folder, one may write to it; the claim of a dead one is taken over."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from qwen_vl_sft.checkpointing.run_folder import _empty, problems_of_output_dir
from qwen_vl_sft.distributed import folder_claim
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.distributed.folder_claim import claim_folder, claim_for_all
from qwen_vl_sft.errors import UserError

SINGLE = DistributedContext("single", 1, 0, 0, on_cpu=True)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(folder_claim, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(folder_claim, "BEAT_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def left_by(folder, number=1, **keys):
    """A claim as another process left it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".claim-{number}.json"
    path.write_text(json.dumps({**folder_claim._here(), "id": "other", **keys}))
    return path


def test_a_claimed_folder_is_refused_until_it_is_released(tmp_path):
    folder = tmp_path / "runs/one"
    with claim_folder(folder, "output_dir") as claim:
        assert [path.name for path in folder.iterdir()] == [".claim-1.json"]
        with pytest.raises(UserError, match=rf"output_dir: .*process {os.getpid()} on .*, since 20"):
            claim_folder(folder, "output_dir")
    claim.release()
    assert not (tmp_path / "runs").exists()
    folder.mkdir(parents=True)
    claim_folder(folder, "output_dir").release()
    assert [*folder.iterdir()] == []


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    begin, outcomes = threading.Barrier(8), []

    def start():
        begin.wait()
        try:
            outcomes.append(claim_folder(tmp_path / "run", "output_dir"))
        except UserError as error:
            outcomes.append(str(error))

    for dead in (False, True):
        if dead:
            left_by(tmp_path / "run", started="0")
        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (claim,) = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        assert len(outcomes) == 8
        claim.release()
        outcomes.clear()
        assert not [*tmp_path.glob("run/.claim*")]


def test_the_claim_of_a_process_that_ended_is_taken_over(tmp_path, capsys):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_by(tmp_path, 3, process=ended.pid, since="2026-01-02 03:04:05 UTC")
    with claim_folder(tmp_path, "output_dir"):
        assert [path.name for path in tmp_path.iterdir()] == [".claim-4.json"]
    assert f"was claimed by process {ended.pid} on" in (told := capsys.readouterr().err)
    assert "since 2026-01-02 03:04:05 UTC, which has ended; this run takes it over" in told


def test_the_number_of_a_process_that_ended_may_be_another_ones(tmp_path):
    left_by(tmp_path, started="1")
    claim_folder(tmp_path, "output_dir").release()


@pytest.mark.parametrize("other", [{"host": "node-7"}, {"process_space": "pid:[1]"}, {"boot": "before"}])
def test_elsewhere_a_claim_is_watched(other, tmp_path, capsys, monkeypatch):
    # The number of this very process says nothing there.
    path = left_by(tmp_path, **other)
    ended = threading.Event()

    def renew():
        while not ended.wait(0.01):
            os.utime(path)

    owner = threading.Thread(target=renew)
    owner.start()
    with monkeypatch.context() as patient:
        patient.setattr(folder_claim, "SILENT_SECONDS", 60.0)
        with pytest.raises(UserError, match="is being written to by another run"):
            claim_folder(tmp_path, "output_dir")
    assert "waiting up to 60 s for a sign that it still runs" in capsys.readouterr().err
    ended.set()
    owner.join()
    claim_folder(tmp_path, "output_dir").release()
    assert "which has ended" in capsys.readouterr().err


def test_a_job_that_slurm_started_again_does_not_wait(tmp_path, capsys, monkeypatch):
    left_by(tmp_path, host="node-7", slurm_job="12", slurm_restart=1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(folder_claim, "SILENT_SECONDS", 1e6)
    claim_folder(tmp_path, "output_dir").release()
    told = capsys.readouterr().err
    assert "on node-7, Slurm job 12, since" in told
    assert "waiting" not in told


def test_a_claim_that_a_kill_left_empty_is_watched_too(tmp_path, capsys):
    (tmp_path / ".claim-1.json").touch()
    claim_folder(tmp_path, "output_dir").release()
    assert "claimed by a process that its claim does not name, which has ended" in capsys.readouterr().err


def test_a_claim_is_renewed(tmp_path):
    with claim_folder(tmp_path, "output_dir") as claim:
        os.utime(claim.path, ns=(1, 1))
        while claim.path.stat().st_mtime_ns == 1:
            time.sleep(0.01)


def test_a_process_whose_claim_was_taken_over_ends(tmp_path, monkeypatch):
    ended = threading.Event()

    def leave(code, message):
        assert code == 1
        assert "was taken over by process" in message
        ended.set()

    monkeypatch.setattr(folder_claim, "leave", leave)
    with claim_folder(tmp_path, "output_dir"):
        left_by(tmp_path, 2)
        assert ended.wait(60)


def test_a_claim_is_no_file_of_a_run(tmp_path):
    claim = left_by(tmp_path)
    assert [*problems_of_output_dir(tmp_path, False, None)] == []
    (tmp_path / "recipe.yaml").touch()
    assert len([*problems_of_output_dir(tmp_path, False, None)]) == 1
    _empty(tmp_path)
    assert [*tmp_path.iterdir()] == [claim]


def test_what_another_run_wrote_meanwhile_is_seen(tmp_path):
    def check():
        assert (tmp_path / "run/.claim-1.json").is_file()
        raise UserError("it is used")

    with pytest.raises(UserError, match="it is used"):
        claim_for_all(tmp_path / "run", "output_dir", SINGLE, check)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*file/run cannot be written: Not a directory"):
        claim_folder(tmp_path / "file/run", "output_dir")
