"""All processes train on the rows that the first has found good; a pickle stands in for what it sends them."""

import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch.distributed as dist

from fixtures.messages import RED, conversation_row, write_messages
from qwen_vl_sft.data.agreed_scan import agreed_scan, sample_digest
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.row_lengths import RowLengths
from qwen_vl_sft.data.scan import Scan, scan
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError

ROWS = [conversation_row(f"<image>Which color is {number}?", images=[RED]) for number in range(6)]
BROKEN = conversation_row(images=["images/nowhere.png"])


@pytest.fixture
def sent(monkeypatch):
    """What the first process has sent, as it would arrive."""
    box = []

    def broadcast(values):
        if values[0] is None:
            values[:] = pickle.loads(box[0])
        else:
            box[:] = [pickle.dumps(values)]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    return box


def context(rank, processes=2):
    return DistributedContext("ddp", processes, rank, rank, on_cpu=True)


def opened(folder, rows, size=(56, 56)):
    return open_rows(str(write_messages(folder, rows, size)), "train")


def not_twice():
    raise AssertionError("the rows were looked at once more")


def test_what_the_first_process_finds_holds_for_all(sent, tmp_path, tiny_processor):
    encoder = Encoder(tiny_processor, None)
    rows = opened(tmp_path, [*ROWS[:2], BROKEN, *ROWS[2:]])
    first = agreed_scan(context(0), rows, lambda: scan(rows, encoder, skip_bad_rows=True, content_hashes=True))
    second = agreed_scan(context(1), rows, not_twice)
    assert first.kept.tolist() == [0, 1, 3, 4, 5, 6]
    assert [row["messages"] for row in second.rows.dataset] == [row["messages"] for row in first.rows.dataset]
    for field in fields(Scan):
        if field.name not in ("rows", "lengths"):
            np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))
    for field in fields(RowLengths):
        np.testing.assert_array_equal(getattr(first.lengths, field.name), getattr(second.lengths, field.name))


def test_one_process_sends_nothing(sent, tmp_path, tiny_processor):
    rows = opened(tmp_path, ROWS)
    assert len(agreed_scan(context(0, 1), rows, lambda: scan(rows, Encoder(tiny_processor, None))).rows) == len(ROWS)
    assert sent == []


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (ROWS[:5], "finds 5 rows, the first process 6; have the same data"),
        ([*ROWS[:5], conversation_row("<image>Which color is it then?")], "finds other rows than the first"),
    ],
)
def test_a_machine_with_other_data_is_refused(others, told, sent, tmp_path, tiny_processor):
    rows = opened(tmp_path / "one", ROWS)
    agreed_scan(context(0), rows, lambda: scan(rows, Encoder(tiny_processor, None)))
    with pytest.raises(UserError) as error:
        agreed_scan(context(1), opened(tmp_path / "other", others), not_twice)
    assert told in str(error.value)
    assert "process 1 on " in str(error.value)


def test_the_same_rows_in_another_folder_are_the_same(tmp_path):
    assert sample_digest(opened(tmp_path / "one", ROWS)) == sample_digest(opened(tmp_path / "other", ROWS))


def test_an_images_bytes_count_and_the_folder_of_its_path_does_not():
    from datasets import Dataset

    from qwen_vl_sft.data.dataset import Rows
    from qwen_vl_sft.data.formats import FORMATS

    def digest(path, image=b"one"):
        return sample_digest(
            Rows(Dataset.from_list([{"image": {"bytes": image, "path": path}}]), FORMATS["chartqa"], "x", None)
        )

    assert digest("/cache/of/a/1.png") == digest("/cache/of/b/1.png") != digest("/cache/of/a/2.png")
    assert digest("1.png") != digest("1.png", b"other")
