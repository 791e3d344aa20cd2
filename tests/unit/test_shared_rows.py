"""Evaluation rows that are training rows too are found by their content."""

import shutil
from types import SimpleNamespace

import pytest

from fixtures.messages import BLUE, RED, conversation_row, write_messages
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.training import plan_warnings, shared_rows
from qwen_vl_sft.training.shared_rows import count_shared_rows

OTHER = "images/a_copy.png"


def question(number, images=(RED,)):
    return conversation_row(f"<image>Which color has {number}?", "red", images)


@pytest.fixture
def scanned(tmp_path, tiny_processor):
    """Scans rows that are written to a folder of their own, with a copy of the red image by another name."""

    def make(name, rows):
        folder = write_messages(tmp_path / name, rows)
        shutil.copy(folder / RED, folder / OTHER)
        return scan(open_rows(str(folder), "train"), Encoder(tiny_processor))

    return make


def test_rows_are_equal_by_what_they_say_and_show(scanned):
    train = scanned("train", [question(number) for number in range(10, 20)])
    again = [question(12, (OTHER,)), question(19)]  # the same picture by another name
    new = [question(12, (BLUE,)), question(21), conversation_row("<image>Which color has 13?", "tan"), question(100)]
    assert count_shared_rows(train, scanned("all", [*again, *new])) == (2, 6)
    assert count_shared_rows(train, scanned("new", new)) == (0, 4)
    data = SimpleNamespace(train=train, evaluation=scanned("all", [*again, *new]))
    assert [text[:15] for text in plan_warnings.warnings_of_evaluation(data)] == ["2 of 6 evaluati"]
    assert plan_warnings.warnings_of_evaluation(SimpleNamespace(train=train, evaluation=None)) == []


def test_no_more_rows_are_read_than_that(scanned, monkeypatch):
    monkeypatch.setattr(shared_rows, "MOST_READ", 9)
    train = scanned("train", [question(number) for number in range(10, 14)])
    assert count_shared_rows(train, train) == (2, 2)
    monkeypatch.setattr(shared_rows, "LOOKED_AT", 1)
    assert count_shared_rows(train, train) == (1, 1)
