"""A checkpoint that one process cannot write is removed once no other one writes into its folder."""

import threading
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from qwen_vl_sft.checkpointing import checkpoints, parts
from qwen_vl_sft.checkpointing.parts import CheckpointParts
from qwen_vl_sft.checkpointing.writer import CheckpointWriter
from qwen_vl_sft.errors import UserError


@pytest.fixture
def store(monkeypatch):
    """The store of a launcher."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def write(writer, accelerator, save):
    writer.write(4, accelerator, writer.parts.rank == 0, save, dict, lambda: None, lambda doing, number: None)


def test_what_another_process_still_writes_goes_too(store, tmp_path):
    first, second = (CheckpointWriter(tmp_path, {}, None, rank=rank, processes=2) for rank in (0, 1))
    together, failed = threading.Barrier(2), threading.Event()
    accelerator = SimpleNamespace(wait_for_everyone=lambda: together.wait(30))
    folder = checkpoints.folder_of(tmp_path, 4)

    def fail():
        (folder / "optimizer.pt").write_text("half")
        failed.set()
        raise OSError(28, "No space left on device")

    def write_late():
        failed.wait(30)
        # The first one is about to remove the folder, and would have by the end of this.
        removed.wait(0.5)
        folder.mkdir(exist_ok=True)
        (folder / "rng_state_1.pth").write_text("numbers")

    def run_second():
        # It waits for the first one until a launcher ends it.
        with pytest.raises(threading.BrokenBarrierError):
            write(second, accelerator, write_late)

    removed = threading.Event()
    thread = threading.Thread(target=run_second)
    thread.start()
    with pytest.raises(UserError, match="No space left on device"):
        write(first, accelerator, fail)
    removed.set()
    left = folder.exists()
    together.abort()
    thread.join()
    assert not left
    assert not folder.exists()


def test_a_process_that_never_ends_its_part_is_not_waited_for_for_ever(store, monkeypatch):
    monkeypatch.setattr(parts, "_SECONDS_FOR_OTHERS", 0.2)
    first, second = (CheckpointParts(rank, 2) for rank in (0, 1))
    seen = []
    monkeypatch.setattr(parts.time, "sleep", seen.append)
    for part in (first, second):
        with part.writing():
            pass
    first.wait_for_others()
    assert not seen
    with pytest.raises(OSError, match="full"), first.writing():
        raise OSError("full")
    first.wait_for_others()
    assert seen


def test_without_a_launcher_nobody_is_waited_for(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    for processes in (1, 2):
        part = CheckpointParts(0, processes)
        with part.writing():
            pass
        part.wait_for_others()
