"""Rows of text files mean what they say by themselves, in any order, file and form."""

import gzip
import json
import os
import pickle
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.messages import RED, conversation_row, png, write_messages
from qwen_vl_sft.data import json_stream, row_files
from qwen_vl_sft.data.dataset import in_memory, open_rows
from qwen_vl_sft.data.row_files import RowFiles
from qwen_vl_sft.errors import MOST_QUOTED, UserError


def texts(conversation):
    return ["".join(part.get("text", "") for part in message["content"]) for message in conversation.messages]


def read(path, split="train", streaming=False):
    rows = open_rows(str(path), split, streaming=streaming)
    return [texts(rows.conversation(row)) for row in rows.dataset]


def parts(text):
    return [{"type": "image"}, {"type": "text", "text": text}]


MIXED = [
    conversation_row("<image>One?", "1"),
    conversation_row(parts("Two?"), 2),
    conversation_row(parts("Three?"), [{"type": "text", "text": "2024-01-01"}]),
    {**conversation_row("<image>Four?", "2024-01-01T10:00:00"), "note": {"any": [1, "x", None]}},
    {**conversation_row("<image>Five?", 0.5), "note": "text"},
]
EXPECTED = [["One?", "1"], ["Two?", "2"], ["Three?", "2024-01-01"], ["Four?", "2024-01-01T10:00:00"], ["Five?", "0.5"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("form", ["lines", "list", "indented", "windows", "objects", "gz"])
def test_a_row_means_the_same_beside_any_other(form, order, streaming, tmp_path):
    rows = MIXED[::order]
    folder = write_messages(tmp_path, rows)
    if form == "windows":
        text = "\r\n".join(map(json.dumps, rows))
        (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif form == "objects":
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    elif form == "gz":
        (folder / "train.jsonl.gz").write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
        (folder / "train.jsonl").unlink()
    elif form != "lines":
        (folder / "train.jsonl").unlink()
        (folder / "train.json").write_text(json.dumps(rows, indent=2 if form == "indented" else None))
    assert read(folder, streaming=streaming) == EXPECTED[::order]
    assert read(folder, "train[1:3]", streaming=streaming) == EXPECTED[::order][1:3]
    if streaming:
        kept = in_memory(open_rows(str(folder), "train[1:]", streaming=True))
        assert [texts(kept.conversation({"row": index})) for index in range(4)] == EXPECTED[::order][1:]
        assert list(kept.dataset["row_id"]) == [1, 2, 3, 4]


def test_rows_are_cached_until_their_file_changes_and_pickle_cheaply(tmp_path, monkeypatch):
    folder = write_messages(tmp_path, [conversation_row(answer=f"{number} {'x' * 1000}") for number in range(200)])
    rows = open_rows(str(folder), "train", shuffle_seed=1, max_rows=150)
    assert len(pickle.dumps(rows)) < 20_000
    copy = pickle.loads(pickle.dumps(rows))
    assert texts(copy.conversation({"row": 7})) == texts(rows.conversation({"row": 7}))
    with monkeypatch.context() as patch:
        patch.setattr(row_files, "_json_rows", None)
        again = open_rows(str(folder), "train", shuffle_seed=1, max_rows=150)
        assert again.dataset._fingerprint == rows.dataset._fingerprint
        assert len(open_rows(str(folder), "train")) == 200
    os.utime(folder / "train.jsonl", (1, 1))
    assert (
        open_rows(str(folder), "train", shuffle_seed=1, max_rows=150).dataset._fingerprint != again.dataset._fingerprint
    )
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(conversation_row(answer="new")))
    assert texts(open_rows(str(folder), "train").conversation({"row": 200})) == ["Which color?", "new"]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[\n {"a": 1}\n {"a": 2}]', r"line 3, column 2: Expecting ',' delimiter"),
        ('[{"a": 1}, \n  x]', r"line 2, column 3: Expecting value"),
        ('[{"a": 1},', r"line 1, column 11: Expecting value"),
        ('[{"a": 1}]\n\n[]', r"line 3, column 1: Extra data"),
        ('[{"a": 1},\n 5]', r"holds no row in line 2, but 5"),
        ("[]", "is empty"),
        ('{\n "a": 1}\n{\n "a": 1,\n}', r"line 5, column 1: Expecting property name"),
        ('{"a": 1, "b": {"a": 1, "c": 2, "c": 3}}', "line 1, column 1: an object holds the key 'c' twice"),
        ('[{"a": 1},\n {"b": 1, "b": 2}]', "line 2, column 2: an object holds the key 'b' twice"),
        ('\n {"a": 1} x', "line 2, column 11: Extra data"),
        ('{"a": ' + 5000 * "1" + "}", "line 1, column 1: Exceeds the limit"),
        ('{"a": "\\ud83d"}', r"half a character in line 1"),
    ],
)
def test_faults_of_json_are_told_with_their_place(text, told, block, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        list(RowFiles((tmp_path / "train.json",)).read())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), values, max_size=4), min_size=1, max_size=5),
    indent=st.sampled_from([None, 1]),
    plain=st.booleans(),
    block=st.integers(1, 50),
)
def test_whatever_is_written_as_json_is_read_as_it_was(rows, indent, plain, block, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    lines, whole = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=plain) for row in rows), encoding="utf-8")
    whole.write_text(json.dumps(rows, ensure_ascii=plain, indent=indent), encoding="utf-8")
    assert list(RowFiles((lines,)).read()) == list(RowFiles((whole,)).read()) == rows


VALUES = ["00501", "5.10", "None", "NA", "nan", "null", "1e5", "true", "2024-01-01", "1,000", 'say "x"']


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "metadata.csv", "metadata.jsonl"])
def test_values_of_a_table_are_the_text_that_was_written(kind, streaming, tmp_path):
    import csv

    folder = tmp_path / "train" if "metadata" in kind else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(png())
    name = "file_name" if "metadata" in kind else "image"
    for number in range(len(VALUES)):
        (folder / f"{number:02}.png").write_bytes(png())
    rows = [{name: f"{number:02}.png", "query": value, "label": value} for number, value in enumerate(VALUES)]
    file = folder / (kind if "metadata" in kind else f"train.{kind}")
    if kind.endswith("jsonl"):
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, [name, "query", "label"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    assert read(tmp_path, streaming=streaming) == [[value, value] for value in VALUES]
    opened = open_rows(str(tmp_path), "train[2:3]", streaming=streaming)
    (row,) = opened.dataset
    assert opened.conversation(row).media[0].path == str((folder / "02.png").resolve())


def test_an_image_folder_of_one_table_is_read_by_the_splits_of_its_images(tmp_path):
    lines = ["file_name,query,label"]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in (1, 0):
            (tmp_path / split / f"{number}.png").write_bytes(png())
            lines.append(f"{split}/{number}.png,{split} {number}?,0{number}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    assert read(tmp_path, "test") == [["test 1?", "01"], ["test 0?", "00"]]
    assert read(tmp_path, "train[1:]") == [["train 0?", "00"]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image,query,label\na.png,x\n", r"has 2 value\(s\) in line 2, under 3 column name\(s\)"),
        ("image,query,query\na,b,c\n", "two columns of one name"),
        ("image,query,label\n", "is empty"),
        ('image,query,label\na,"b,c\na,b,c\n', "is no table \\(line 3: unexpected end of data"),
        ("image,query,label,\na,b,c,d\n", "a column without a name in its first line"),
        (
            "image;query;label\na;b;c\n",
            "whose name holds ';'; separate its values with commas",
        ),
        ("image\tquery\tlabel\na\tb\tc\n", "whose name holds '\\\\t'"),
        ("sep=;\nimage;query;label\na;b;c\n", "whose name holds ';'"),
    ],
)
def test_faults_of_tables_are_told(text, told, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        open_rows(str(tmp_path), "train")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "folder"])
def test_a_name_is_no_pattern(kind, streaming, tmp_path):
    import datasets

    found = {}
    for name, answer in (("export[1]", "right"), ("export1", "wrong"), ("ex*", "star"), ("exa", "wrong")):
        folder = tmp_path / name
        write_messages(folder, [])
        row = {"image": RED, "query": "Which?", "label": answer}
        (folder / "train.jsonl").unlink()
        if kind == "jsonl":
            (folder / "train.jsonl").write_text(json.dumps(row))
        elif kind == "csv":
            (folder / "train.csv").write_text(f"image,query,label\n{RED},Which?,{answer}\n")
        elif kind == "parquet":
            datasets.Dataset.from_list([row]).to_parquet(folder / "train-00000-of-00001.parquet")
        else:
            (folder / "metadata.csv").write_text(f"file_name,query,label\n{RED},Which?,{answer}\n")
        found[name] = [*folder.iterdir()]
        assert read(folder, streaming=streaming) == [["Which?", answer]]
    if kind == "parquet":
        for name, answer in (
            ("a[0].parquet", "this"),
            ("a0.parquet", "other"),
            ("b*.parquet", "star"),
            ("bc.parquet", "x"),
        ):
            row = {"image": RED, "query": "Which?", "label": answer}
            datasets.Dataset.from_list([row]).to_parquet(tmp_path / name)
            assert read(tmp_path / name, streaming=streaming) == [["Which?", answer]]


@pytest.mark.parametrize("streaming", [False, True])
def test_values_of_a_table_of_arrow_are_those_that_were_written(streaming, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    kinds, rows = ClassLabel(names=["cat", "dog"]), [{"image": RED, "query": "?", "label": None}] * 3
    for feature, values, answers in (
        (kinds, [1, 0, None], ["dog", "cat"]),
        (List(kinds), [[1, 0], [0], []], ["dog", "cat"]),
        (Value("float32"), [0.1, 2.0, None], ["0.1", "2"]),
        (List(Value("float16")), [[0.1], [5], []], ["0.1", "5"]),
        (Value("decimal128(9, 2)"), [Decimal("5.10"), Decimal("12.00"), None], ["5.10", "12.00"]),
        (Value("int64"), [2**62 + 5, 0, None], [str(2**62 + 5), "0"]),
    ):
        features = Features({"image": Value("string"), "query": Value("string"), "label": feature})
        table = [{**row, "label": value} for row, value in zip(rows, values, strict=True)]
        Dataset.from_list(table, features=features).to_parquet(tmp_path / "train.parquet")
        assert read(tmp_path / "train.parquet", "train[:2]", streaming) == [["?", answer] for answer in answers]
    # As pandas writes its categories.
    categories = pa.table({"image": [RED] * 2, "query": ["?"] * 2, "label": pa.array(["a", "b"]).dictionary_encode()})
    pq.write_table(categories, tmp_path / "train.parquet")
    assert read(tmp_path, streaming=streaming) == [["?", "a"], ["?", "b"]]
    part = {"type": ClassLabel(names=["image", "text"]), "text": Value("string"), "image": Image()}
    turn = {"role": ClassLabel(names=["assistant", "user"]), "content": List(part)}
    question = [{"type": 0, "text": None, "image": png("blue")}, {"type": 1, "text": "?", "image": None}]
    answer = [{"type": 1, "text": "blue", "image": None}]
    turns = [{"role": 1, "content": question}, {"role": 0, "content": answer}]
    Dataset.from_list([{"messages": turns}], features=Features({"messages": List(turn)})).to_parquet(
        tmp_path / "train.parquet"
    )
    rows = open_rows(str(tmp_path), "train", streaming=streaming)
    (row,) = rows.dataset
    assert [texts(rows.conversation(row)), rows.conversation(row).media[0].read()] == [["?", "blue"], png("blue")]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk_are_read(streaming, tmp_path):
    from datasets import Dataset, DatasetDict, Features, Image, Value

    features = Features({"image": Image(), "query": Value("string"), "label": Value("string")})
    rows = [{"image": {"bytes": png(), "path": None}, "query": f"{number}?", "label": "x"} for number in range(4)]
    dataset = Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": dataset.select([3])}).save_to_disk(tmp_path / "both")
    for name in ("one", "both"):
        assert read(tmp_path / name, "train[1:3]", streaming) == [["1?", "x"], ["2?", "x"]]
    assert read(tmp_path / "both", "test", streaming) == [["3?", "x"]]
    for split in ("train", "test"):
        dataset.select([2] if split == "test" else [0, 1]).save_to_disk(tmp_path / "apart" / split)
    assert read(tmp_path / "apart", "test", streaming) == [["2?", "x"]]
    for name, told in (("one", "train"), ("both", "train, test"), ("apart", "test, train")):
        with pytest.raises(
            UserError, match=f"has no split 'val'; save_to_disk has written {told}; name another as data"
        ):
            open_rows(str(tmp_path / name), "val", streaming=streaming)


def test_a_table_may_begin_with_empty_lines(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"\r\n\nprompt,completion\n\nQ,00501\n")
    assert read(tmp_path) == [["Q", "00501"]]


def test_parquet_files_that_belong_to_no_split_are_told(tmp_path, caplog):
    from datasets import Dataset

    for name in ("train.parquet", "test.parquet", "extra[1].parquet", ".cache/x.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Dataset.from_dict({"prompt": [name], "completion": ["x"]}).to_parquet(tmp_path / name)
    assert read(tmp_path) == [["train.parquet", "x"]]
    assert "1 of its 4 parquet files belong to no split by their names and are not read, such as extra[1].parquet" in (
        caplog.text
    )
    caplog.clear()
    (tmp_path / "extra[1].parquet").unlink()
    assert read(tmp_path, "test") == [["test.parquet", "x"]]
    assert not caplog.text
    (tmp_path / "a::b").mkdir()
    (tmp_path / "test.parquet").rename(tmp_path / "a::b/test.parquet")
    with pytest.raises(UserError, match="with :: in its path cannot be read; rename it"):
        open_rows(str(tmp_path / "a::b"), "test")


@pytest.mark.parametrize("where", ["", "train/"])
def test_two_tables_beside_the_same_images_are_refused(where, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.png").write_bytes(png())
    (tmp_path / f"{where}metadata.csv").write_text("file_name,query,label\na.png,?,x\n")
    (tmp_path / f"{where}metadata.jsonl").write_text('{"file_name": "a.png", "query": "?", "label": "y"}\n')
    with pytest.raises(UserError, match=r"two files of one name, metadata.csv and metadata.jsonl; keep one"):
        open_rows(str(tmp_path), "train")


def test_files_of_a_split_with_other_types_are_told_in_one_message(tmp_path):
    from datasets import Dataset

    for number, row in enumerate([{"prompt": "a"}, {"prompt": "a", "system": "x"}, {"prompt": ["a"]}]):
        for kind in ("column", "type"):
            if number != (1 if kind == "type" else 2):
                (tmp_path / kind).mkdir(exist_ok=True)
                name = f"train-0000{number}-of-00003.parquet"
                Dataset.from_list([{**row, "completion": "x"}]).to_parquet(tmp_path / kind / name)
    for kind, told in (("column", "1 new columns"), ("type", "Couldn't cast array of type")):
        with pytest.raises(UserError, match=f"{told}.*; write all files of a split with the same columns and types"):
            open_rows(str(tmp_path / kind), "train")


def test_many_files_of_other_splits_are_told_in_short(tmp_path):
    for number in range(99):
        (tmp_path / f"file_{number}.jsonl").write_text("{}")
    with pytest.raises(UserError, match="has no split 'train'; its files give file_0, ") as error:
        open_rows(str(tmp_path), "train")
    assert len(str(error.value)) < MOST_QUOTED + 300


def test_rows_of_texts_are_compared_with_trl(tmp_path):
    from types import SimpleNamespace

    from qwen_vl_sft.data.scan import Scan
    from qwen_vl_sft.tools.benchmark import as_messages

    rows = open_rows(str(write_messages(tmp_path, [conversation_row(), conversation_row(parts("Second?"))])), "train")
    scan = Scan(rows, None, None, [], [])
    found = as_messages(SimpleNamespace(train=scan, encoder=SimpleNamespace(system_message=None)))
    assert found[1]["messages"][0]["content"] == parts("Second?")
    assert [image.size for row in found for image in row["images"]] == [(56, 56), (56, 56)]
