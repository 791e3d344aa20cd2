"""Run the check on all processes of a job: they meet at a store, and the first one judges and tells."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.distributed.shared_folder import sees, written
from qwen_vl_sft.errors import first_line
from qwen_vl_sft.preflight.node import Facts, look
from qwen_vl_sft.preflight.options import ProcessPlace
from qwen_vl_sft.preflight.verdict import (
    AddedUp,
    common_adapters,
    format_page,
    judge_all_reduce,
    judge_nodes,
    judge_sight,
)

# A file that was written just now is seen within this time, as nobody has looked for it before.
_SECONDS_TO_SEE = 5.0
_POLL = 0.05


class Meeting:
    """A store that all processes reach, with a limit on how long one waits for another."""

    def __init__(self, place: ProcessPlace, seconds: float) -> None:
        self.place = place
        self.seconds = seconds
        self.store = dist.TCPStore(
            place.address,
            place.port,
            place.processes,
            is_master=place.rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )

    def tell(self, subject: str, value: Any) -> None:
        """Tell what this process knows of a subject."""
        self.store.set(f"{subject}/{self.place.rank}", json.dumps(value))

    def ask(self, subject: str, ranks: list[int], patience: float = 1.0) -> dict[int, Any]:
        """Return what others tell of a subject, those that do within `patience` times the limit."""
        ends, waiting = time.monotonic() + patience * self.seconds, list(ranks)
        answers: dict[int, Any] = {}
        while waiting and time.monotonic() < ends:
            for rank in [rank for rank in waiting if self.store.check([f"{subject}/{rank}"])]:
                answers[rank] = json.loads(self.store.get(f"{subject}/{rank}"))
                waiting.remove(rank)
            if waiting:
                time.sleep(_POLL)
        return answers

    def hear(self, subject: str) -> Any:
        """Return what the first process tells of a subject, which waits for others itself. Raises `TimeoutError`."""
        answers = self.ask(subject, [0], patience=2.0)
        if not answers:
            raise TimeoutError(f"process 0 of the check on {self.place.address} told nothing")
        return answers[0]


def run_preflight(
    place: ProcessPlace, nodes: tuple[str, ...], output_dir: Path | None, verdict_file: Path | None, seconds: float
) -> int:
    """Check this process's part, and on the first process judge all of them; return the exit code.

    It is 1 on the first process when nodes are to be left out or something else is wrong, as its page and `verdict_file`
    tell. Raises `OSError` and `RuntimeError` on another process that does not reach the first.
    """
    facts = look(place.node, place.local_rank, output_dir, torch.cuda.is_available() or _has_gpus())
    meeting = Meeting(place, seconds)
    if place.rank:
        _take_part(meeting, facts, output_dir)
        return 0
    meeting.tell("facts", asdict(facts))
    told = meeting.ask("facts", list(range(place.processes)))
    found = [_facts(told[rank]) for rank in sorted(told)]
    verdict = judge_nodes(found, nodes, place.processes)
    well = verdict.line() == "pass"
    with contextlib.ExitStack() as stack:
        folder = output_dir if well else None
        meeting.tell("written", stack.enter_context(written(folder)) if folder is not None else None)
        if folder is not None:
            first = [rank for rank, one in enumerate(found) if rank and one.local_rank == 0]
            seen = meeting.ask("seen", first)
            judge_sight(found, {rank: seen.get(rank, False) for rank in first}, str(folder), verdict)
    well = verdict.line() == "pass"
    meeting.tell("adds_up", well)
    added_up = _add_up_all(meeting) if well else None
    if added_up is not None:
        judge_all_reduce(found, added_up, verdict)
    print(format_page(found, verdict, added_up), flush=True)
    if verdict_file is not None:
        atomic_write(verdict_file, f"{verdict.line()}\n{common_adapters(found) or ''}\n")
    meeting.tell("end", verdict.line())
    # The store ends with this process: the others leave first.
    meeting.ask("left", [rank for rank in told if rank], patience=0.2)
    return 0 if verdict.line() == "pass" else 1


def _take_part(meeting: Meeting, facts: Facts, output_dir: Path | None) -> None:
    """Do on another process what the first asks for, until it has judged."""
    meeting.tell("facts", asdict(facts))
    name = meeting.hear("written")
    if name is not None and output_dir is not None and facts.local_rank == 0:
        meeting.tell("seen", sees(output_dir / name, _SECONDS_TO_SEE))
    if meeting.hear("adds_up"):
        meeting.tell("added", _add_up(meeting))
    meeting.hear("end")
    meeting.tell("left", True)


def _has_gpus() -> bool:
    """Return whether this node has GPUs though PyTorch sees none, which is a fault and no node of CPUs."""
    return Path("/proc/driver/nvidia/gpus").is_dir()


def _facts(values: Mapping[str, Any]) -> Facts:
    return Facts(**{**values, **{name: tuple(values[name]) for name in ("faults", "notes", "cached")}})


def _add_up_all(meeting: Meeting) -> AddedUp:
    """Take part in the all-reduce on the first process, and return how it ended on all."""
    processes = meeting.place.processes
    own = _add_up(meeting)
    told = {0: own} | meeting.ask("added", list(range(1, processes)), patience=0.2)
    failed = {rank: one["failed"] for rank, one in told.items() if one.get("failed")}
    if failed:
        # Whoever fails first makes the others wait, who fail later and because of it.
        first = min(failed, key=lambda rank: float(told[rank]["after"]))
        return AddedUp(failed={first: failed[first]})
    seconds = [one["seconds"] for one in told.values() if "seconds" in one]
    if len(seconds) < processes:
        return AddedUp()
    # Each process sends the share of all others twice: once added up, once handed out.
    return AddedUp(bandwidth=2 * (processes - 1) / processes * _bytes() / max(seconds))


def _bytes() -> int:
    return (256 if torch.cuda.is_available() else 4) * 2**20


def _add_up(meeting: Meeting) -> dict[str, Any]:
    """Add up a tensor with all processes: the seconds it takes, or what failed after how many; neither within the limit."""
    outcome: dict[str, Any] = {}
    began = time.monotonic()

    def work() -> None:
        try:
            outcome["seconds"] = _all_reduce(meeting)
        except Exception as error:  # of backends, which raise a dozen kinds
            outcome.update(failed=first_line(error), after=time.monotonic() - began)

    # It may hang in a library: then it is left alone, and the process ends without it.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(meeting.seconds)
    return dict(outcome)


def _all_reduce(meeting: Meeting) -> float:
    """Return the seconds of an all-reduce over all processes, which must give the right sum."""
    place, cuda = meeting.place, torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("added_up", meeting.store),
        rank=place.rank,
        world_size=place.processes,
        # Longer than this process waits: a backend that ends it would leave no verdict.
        timeout=timedelta(seconds=10 * meeting.seconds),
    )
    values = torch.ones(_bytes() // 4, device="cuda" if cuda else "cpu")
    dist.all_reduce(values)
    assert bool((values == place.processes).all()), "the sum over all processes is wrong"
    times = 10 if cuda else 3
    began = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(values)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times
