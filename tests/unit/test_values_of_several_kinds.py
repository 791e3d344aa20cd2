"""Columns of several kinds that `datasets` has written: texts that it takes for JSON are the texts that they were."""

import json
from pathlib import Path

import datasets
import pytest

from qwen_vl_sft.data.dataset import in_memory, open_rows
from qwen_vl_sft.data.undecoded import undecoded

TEXTS = ["red", "5", "5.10", "007", "1e5", "null", "NaN", "[1, 2]", '{"total": 5.10}', "é"]


@pytest.fixture
def prepared(tmp_path: Path) -> dict[str, Path]:
    """Chats with texts as answers and lists of parts as questions, as `datasets` writes what it has read from JSON."""
    question = {"role": "user", "content": [{"type": "text", "text": "7.50?"}]}
    chats = [{"messages": [question, {"role": "assistant", "content": text}]} for text in TEXTS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    read = datasets.load_dataset(
        "json", data_files=str(tmp_path / "chats.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(read.features["messages"].feature["content"], datasets.Json)
    assert read[2]["messages"][1]["content"] == 5.1
    (tmp_path / "parquet").mkdir()
    read.to_parquet(tmp_path / "parquet" / "train.parquet")
    datasets.DatasetDict({"train": read}).save_to_disk(tmp_path / "saved")
    return {"parquet": tmp_path / "parquet", "saved": tmp_path / "saved"}


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("way", ["looked up", "streamed", "streamed into memory"])
def test_answers_are_the_texts_that_were_written(prepared, kind, way):
    rows = open_rows(str(prepared[kind]), "train", streaming=way != "looked up", row_format="messages")
    rows = in_memory(rows) if way == "streamed into memory" else rows
    items = list(rows.dataset) if rows.streamed else [{"row": row} for row in range(len(rows))]
    found = [rows.conversation(item).messages for item in items]
    assert [answer["content"] for _, answer in found] == [[{"type": "text", "text": text}] for text in TEXTS]
    assert all(question["content"] == [{"type": "text", "text": "7.50?"}] for question, _ in found)


def test_values_stay_values(tmp_path):
    written = [
        7,
        0.5,
        True,
        {"ref": ["bar"], "bbox": [[10, 20.5, 30, 40]]},
        [{"type": "text", "text": "5.10"}],
        [1, 2],
        None,
    ]
    typed = datasets.Dataset.from_dict({"objects": written}, features=datasets.Features({"objects": datasets.Json()}))
    assert undecoded(typed)["objects"][:] == written
