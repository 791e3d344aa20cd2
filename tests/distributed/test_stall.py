"""Runs whose processes wait for each other for ever end with a report of what each was doing; slow ones go on."""

import os
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from fixtures.faulty_runs import KEYS
from fixtures.processes import PROCESS_TIMEOUT, Popen, launcher, still_there
from fixtures.repository import REPOSITORY
from qwen_vl_sft.checkpointing.row_log import read_row_log
from qwen_vl_sft.resilience import watchdog
from qwen_vl_sft.resilience.watchdog import Standing, Watchdog, format_report

TIMEOUT = 20


# The report


def standing(place, doing="step 3, waiting for its data", waits=True):
    return Standing(doing, place, 17.6, "poll < wait (queue.py:12)", waits)


def test_the_report_says_what_each_does_and_who_is_behind():
    lines = format_report([standing((3, 1), "step 3, adding up"), standing((3, 0))], 18, Path("run")).splitlines()
    assert lines[0].startswith("error: a process has waited for 18 s, most of ddp_timeout")
    assert lines[1] == "  process 0: step 3, adding up, for 18 s; in poll < wait (queue.py:12)"
    assert lines[2] == "  process 1: step 3, waiting for its data, for 18 s; in poll < wait (queue.py:12)"
    assert lines[3].startswith("The others wait for process 1, which is furthest behind; run/stalled-rank-N.txt")
    assert "--resume_from_checkpoint latest" in lines[3]


def test_one_that_does_not_answer_is_the_one_to_look_at():
    text = format_report([None, standing((3, 0))], 18, Path("run"))
    assert "process 0: no answer, so it has gone or is frozen" in text
    assert "The others wait for process 0," in text


def test_where_all_are_at_one_point_it_is_the_one_that_waits_for_none():
    both = [standing((3, 2)), standing((3, 2), waits=False)]
    assert "wait for process 1, which is at the same point but waits for none" in format_report(both, 18, Path("run"))
    assert "All are at the same point, so" in format_report([standing((3, 2))] * 2, 18, Path("run"))


def test_a_later_step_is_further_on_whatever_its_stage():
    assert "wait for process 1," in format_report([standing((4, 0)), standing((3, 7))], 18, Path("run"))


def test_of_many_processes_those_behind_are_shown():
    lines = format_report([standing((3, 1))] * 400 + [standing((3, 0))] * 2, 18, Path("run")).splitlines()
    assert len(lines) < 40
    assert any(line.startswith("  process 401: ") for line in lines)
    assert "  and 370 more, which are further on" in lines
    assert "wait for process 400, 401," in lines[-1]


# The watch


class Left(Exception):
    """Stands for the hard exit of a process."""


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Makes watches of one run whose `leave` raises, beside the store of a launcher."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)

    monkeypatch.setattr(watchdog.gc, "disable", lambda: None)

    def leave(code, message, show):
        raise Left(code, message, show)

    monkeypatch.setattr(watchdog, "leave", leave)

    def make(rank, timeout, processes=1):
        assert store.port, "the store lives as long as the test"
        return Watchdog(tmp_path, rank, processes, timeout)

    return make


def test_who_moves_is_not_ended_and_who_stops_is(watch, tmp_path, monkeypatch):
    clock, looks, finished = [0.0], [], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    entry = watch(0, timeout=3.0)

    def wait(seconds):
        clock[0] += seconds
        looks.append(seconds)
        if len(looks) <= 100:
            entry.report_progress(f"step {len(looks)}", len(looks))
        elif len(looks) == 101:
            while not watchdog._main_thread()[0].startswith("_wait_for_tstate_lock"):
                time.sleep(0.001)

    entry._ended.wait = wait

    def run():
        with pytest.raises(Left) as left:
            Watchdog.run(entry)
        finished.append(left.value.args)

    thread = watchdog.threading.Thread(target=run)
    thread.start()
    thread.join(60)
    ((code, message, _),) = finished
    assert code == 1
    assert sum(looks[:100]) > 2 * entry.limit
    assert len(looks) > 100, "it was ended although it moved"
    assert re.search(r"process 0: step 100, for \d s; in _wait_for_tstate_lock < join < test_who_moves", message)
    assert "test_stall.py" in (tmp_path / "stalled-rank-0.txt").read_text()


def test_a_suspended_job_is_not_ended_for_the_time_it_did_not_run(watch, monkeypatch):
    entry, clock = watch(0, timeout=100), [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    ticks = []

    def wait(seconds):
        clock[0] += 5000 if len(ticks) == 3 else seconds
        ticks.append(seconds)
        return len(ticks) > 20

    entry._ended.wait = wait
    entry.run()
    assert clock[0] > 5000


def test_all_processes_end_with_one_report(watch, capsys):
    """One notices; another, which moves, is asked; the third never answers."""
    first, second = watch(0, timeout=0.5, processes=3), watch(1, timeout=60, processes=3)
    for entry in (first, second):
        entry._patience = lambda: 5.0
    second.interval = 0.1
    second.report_progress("step 2, waiting for its data", 2, 0)
    left = []

    def run(entry):
        with pytest.raises(Left) as end:
            Watchdog.run(entry)
        left.append(end.value.args)

    threads = [watchdog.threading.Thread(target=run, args=(entry,)) for entry in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {code for code, _, _ in left} == {1}
    message = max(text for _, text, _ in left)
    assert {text for _, text, _ in left} == {message, message.splitlines()[0]}
    assert "process 1: step 2, waiting for its data" in message
    assert "process 2: no answer" in message
    assert capsys.readouterr().err.count(message) == 1
    assert not any(show for _, _, show in left)


def test_without_a_store_the_process_still_ends_and_speaks(watch, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(Left) as left:
        watch(1, timeout=0.2, processes=2).run()
    code, message, speaks = left.value.args
    assert (code, speaks) == (1, True)
    assert "process 1: starting" in message


# Whole runs


def start(folder, fault, config="cpu", **keys):
    """Run scripts/sft.py with a fault on two processes to its end; what it wrote to the standard error."""
    named = {**KEYS, "output_dir": folder / "run", "dataloader_num_workers": 1, "ddp_timeout": TIMEOUT, **keys}
    command = [
        sys.executable,
        *launcher(config),
        REPOSITORY / "tests/fixtures/faulty_run.py",
        *(word for key in named for word in (f"--{key}", str(named[key]))),
    ]
    env = {**os.environ, "FAULT": fault, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # Files, since a pipe would wait for a process that is left over.
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        process = Popen(command, cwd=REPOSITORY, env=env, stdout=out, stderr=err)
    try:
        process.wait(PROCESS_TIMEOUT)
    finally:
        found = psutil.process_iter(["cmdline"])
        left = still_there([one for one in found if str(folder / "run") in (one.info["cmdline"] or [])], within=60)
        for entry in left:
            entry.kill()
    assert left == []
    return process.returncode, (folder / "err.txt").read_text()


BEHIND = {
    "hang_data": (1, r"step \d, waiting for its data, for \d+ s; in "),
    "hang_forward": (
        1,
        r"step 5, forward of micro-batch 1 of 1: 1 row\(s\) \(row_id \d\), 1 x \d+ tokens, .*stand_still",
    ),
}
ELSEWHERE = {
    "hang_data": r"step \d, adding up the learned tokens of all processes: 1 row\(s\) \(row_id \d\), \d+ tokens, for",
    "hang_forward": r"step 5, (forward|backward) of micro-batch 1 of 1: 1 row\(s\) \(row_id \d\), 1 x \d+ tokens",
}


@pytest.mark.parametrize("fault", ["hang_data", pytest.param("hang_forward", marks=pytest.mark.long)])
def test_a_run_that_stands_still_ends_and_says_why(fault, tmp_path):
    code, text = start(tmp_path, fault)
    assert code == 1, text[-3000:]
    # Four steps of 5 s each are more than the limit, but each is a move.
    assert len(read_row_log(tmp_path / "run")) == (4 if fault == "hang_forward" else 1)
    assert f"error: a process has waited for {0.9 * TIMEOUT:.0f} s" in text
    rank, doing = BEHIND[fault]
    assert re.search(rf"process {rank}: {doing}", text), text[-3000:]
    assert re.search(rf"process {1 - rank}: {ELSEWHERE[fault]}", text), text[-3000:]
    assert f"The others wait for process {rank}," in text
    for number in (0, 1):
        stacks = (tmp_path / f"run/stalled-rank-{number}.txt").read_text()
        assert "most recent call first" in stacks
        assert "in training_step" in stacks or "in get_batch_samples" in stacks
