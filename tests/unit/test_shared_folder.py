"""All processes of a run must see one output_dir; those of another machine are played here."""

import platform
from pathlib import Path

import pytest
import torch.distributed as dist

from qwen_vl_sft.distributed import shared_folder
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.distributed.shared_folder import check_shared
from qwen_vl_sft.errors import UserError

SINGLE = DistributedContext("single", 1, 0, 0, on_cpu=True)


class Others:
    """In place of torch.distributed: what the first process tells, and what the others answer."""

    def __init__(self, told=None, answers=()):
        self.told, self.answers = told, answers
        self.heard = None

    def is_initialized(self):
        return True

    def broadcast_object_list(self, values):
        values[:] = [self.told] if self.told else values
        (self.heard,) = values

    def all_gather_object(self, answers, own):
        answers[:] = [own, *self.answers] if self.told is None else [*self.answers, own]


@pytest.fixture
def others(monkeypatch):
    def play(**keys):
        monkeypatch.setattr(shared_folder, "_SECONDS_TO_SEE", 0.0)
        played = Others(**keys)
        for name in ("is_initialized", "broadcast_object_list", "all_gather_object"):
            monkeypatch.setattr(dist, name, getattr(played, name))
        return played

    return play


def context(rank, processes=2):
    return DistributedContext("ddp", processes, rank, rank, on_cpu=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_all_see_is_left_as_it_was(exists, others, tmp_path):
    played = others(answers=[("node2", True)])
    if exists:
        (tmp_path / "runs/one").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    check_shared(tmp_path / "runs/one", context(0))
    assert played.heard[0].startswith(".seen-by-all-")
    assert sorted(tmp_path.rglob("*")) == before


def test_machines_that_do_not_see_it_are_named(others, tmp_path):
    others(answers=[(platform.node(), True), ("node2", False), ("node2", False)])
    with pytest.raises(UserError) as error:
        check_shared(tmp_path / "runs/one", context(0, processes=4))
    assert f"what process 0 on {platform.node()} writes to {tmp_path / 'runs/one'}" in str(error.value)
    assert "is not seen by process(es) 2, 3 on node2" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_does_not_see_it_ends_too(others, tmp_path):
    others(told=[".seen-by-all-x", None], answers=[("node1", True)])
    with pytest.raises(UserError, match=f"process 0 on node1 .* not seen by process.es. 1 on {platform.node()}"):
        check_shared(tmp_path, context(1))


def test_all_end_where_the_first_cannot_write(others, tmp_path):
    (tmp_path / "file").touch()
    played = others()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        check_shared(tmp_path / "file/run", context(0))
    others(told=played.heard)
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        check_shared(tmp_path / "file/run", context(1))


def test_one_process_alone_asks_nobody_but_the_folder(tmp_path):
    check_shared(tmp_path / "run", SINGLE)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory; name another folder"):
        check_shared(tmp_path / "file/run", SINGLE)


def test_a_process_that_does_not_see_it_leaves_nothing(others, tmp_path):
    others(told=[".seen-by-all-x", None], answers=[("node1", True)])
    with pytest.raises(UserError, match=r"not seen by process\(es\) 1"):
        check_shared(tmp_path / "runs/one", context(1))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_remembered_as_missing_is_asked_for(others, tmp_path, monkeypatch):
    """NFS shows what another machine has made up to a minute later, but to one that would make it too."""
    others(told=[".seen-by-all-x", None], answers=[("node1", True)])
    make = Path.mkdir

    def shows(folder, *args, **kwargs):
        make(folder, *args, **kwargs)
        (folder / ".seen-by-all-x").touch()

    monkeypatch.setattr(Path, "mkdir", shows)
    (tmp_path / "runs").mkdir()
    check_shared(tmp_path / "runs/one", context(1))
