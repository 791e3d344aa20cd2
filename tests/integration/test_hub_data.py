"""Datasets on the stand-in for the Hub: their text files mean what is written in them, as those of a local folder do."""

import io
import itertools
import json
import logging
import shutil
import tarfile

import pytest
from datasets import load_dataset_builder
from huggingface_hub.utils import httpx

from fixtures.messages import conversation_row, png
from fixtures.publishing import set_offline, start_hub, take_hub
from qwen_vl_sft.data.dataset import in_memory, open_rows
from qwen_vl_sft.errors import UserError

LABELS = ["00501", "5.10", "None", "NA", "2024-01-02", "1e5", "true", "+7", "NaN", "0x1F", "1_000", "12:30"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    yield from start_hub(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def online(hub, tmp_path, monkeypatch):
    """Take the stand-in for the Hub, with an empty cache."""
    take_hub(hub, tmp_path / "cache", monkeypatch)


def table(labels, separator=","):
    return "".join(
        separator.join(values) + "\n" for values in [("prompt", "completion"), *(("What?", one) for one in labels)]
    )


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def turns(answer, question="What?"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def read(rows):
    dataset = rows.dataset if not rows.streamed else in_memory(rows).dataset
    return list(dataset)


def answers(*args, **kwargs):
    rows = open_rows(*args, **kwargs)
    items = [{"row": number} for number in range(len(rows))] if not rows.streamed else read(rows)
    return [rows.conversation(item).last_answer for item in items]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_text_stays_the_text_that_was_written(kind, streaming, hub):
    data = {
        "csv": table(LABELS),
        "tsv": table(LABELS, "\t"),
        "jsonl": lines({"prompt": "What?", "completion": label} for label in LABELS),
        "json": json.dumps([{"prompt": "What?", "completion": label} for label in LABELS]),
    }
    hub.put_dataset("alice/values", {f"data/train.{kind}": data[kind]})
    rows = read(open_rows("alice/values", "train", streaming=streaming))
    assert [row["completion"] for row in rows] == LABELS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_content_may_be_text_in_one_row_and_parts_in_the_next(streaming, hub):
    parts = [{"type": "text", "text": "What?"}]
    written = [turns(f"Answer {number}") for number in range(200)] + [turns("Late", parts), turns("Last")]
    hub.put_dataset("alice/mixed", {"train.jsonl": lines(written)})
    assert answers("alice/mixed", "train", streaming=streaming)[-3:] == ["Answer 199", "Late", "Last"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["", "data/"])
def test_images_that_rows_name_are_downloaded(place, streaming, hub):
    rows = [turns("red") | {"images": ["images/red.png"]}, turns("blue") | {"images": ["images/blue.png"]}]
    files = {f"{place}images/{name}.png": png(name) for name in ("red", "blue")}
    hub.put_dataset("alice/charts", {f"{place}train.jsonl": lines(rows), **files})
    found = open_rows("alice/charts", "train", streaming=streaming)
    images = [found.conversation(row).media[0].decode().getpixel((0, 0)) for row in found.dataset]
    assert images == [(255, 0, 0), (0, 0, 255)]
    hub.log()
    open_rows("alice/charts", "train", streaming=streaming)
    assert not [line for line in hub.log() if ".png" in line]


def test_more_images_than_rows_do_not_hide_the_rows(hub):
    rows = lines([turns("red") | {"images": ["a.png"]}])
    hub.put_dataset("alice/llava", {"train.json": rows} | {f"{name}.png": png("red") for name in "abcde"})
    assert answers("alice/llava", "train") == ["red"]


def test_no_image_is_downloaded_for_rows_that_name_none(hub):
    hub.put_dataset(
        "alice/text", {"train.jsonl": lines([turns("red")]), "logo.png": png("red"), "test.jsonl": "no JSON"}
    )
    assert answers("alice/text", "train") == ["red"]
    assert not [line for line in hub.log() if "logo.png" in line or ("resolve" in line and "test.jsonl" in line)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_beside_images(kind, streaming, hub):
    def described(label):
        row = {"file_name": "a.png", "prompt": "What?", "completion": label}
        return lines([row]) if kind == "jsonl" else ",".join(row) + "\n" + ",".join(row.values()) + "\n"

    files = {f"{split}/metadata.{kind}": described(label) for split, label in (("train", "00501"), ("test", "NA"))}
    images = {"train/a.png": png("red"), "test/a.png": png("blue")}
    hub.put_dataset(f"alice/folder-{kind}", files | images)
    for split, label, color in (("train", "00501", (255, 0, 0)), ("test", "NA", (0, 0, 255))):
        rows = open_rows(f"alice/folder-{kind}", split, streaming=streaming)
        (row,) = read(rows)
        assert row["completion"] == label
        assert rows.conversation(row).media[0].decode().getpixel((0, 0)) == color


def tar_of(files):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return raw.getvalue()


@pytest.mark.parametrize("table", ["metadata.csv", "train.jsonl"])
def test_images_in_archives_beside_the_rows(table, hub):
    row = {"file_name" if table == "metadata.csv" else "image": "a.png", "prompt": "What?", "completion": "00501"}
    text = lines([row]) if table == "train.jsonl" else "\n".join([",".join(row), ",".join(row.values())])
    hub.put_dataset("alice/tarred", {table: text, "images.tar": tar_of({"./a.png": png("blue")})})
    rows = open_rows("alice/tarred", "train")
    assert rows.conversation({"row": 0}).media[0].decode().getpixel((0, 0)) == (0, 0, 255)
    assert rows.dataset[0]["completion"] == "00501"


def test_one_table_above_the_images_of_two_splits(hub):
    table = "file_name,prompt,completion\ntrain/a.png,What?,5.10\ntest/b.png,What?,007\n"
    hub.put_dataset("alice/above", {"metadata.csv": table, "train/a.png": png("red"), "test/b.png": png("blue")})
    assert [row["completion"] for row in read(open_rows("alice/above", "test"))] == ["007"]
    assert [row["completion"] for row in read(open_rows("alice/above", "train"))] == ["5.10"]


CONFIGS = """---
configs:
- config_name: easy
  default: true
  data_files:
  - split: train
    path: parts/*.csv
  - split: validation
    path: held_out.csv
- config_name: hard
  data_dir: hard
- config_name: german
  data_files: de.csv
  sep: ";"
---
"""


def test_the_card_says_which_files_make_which_split(hub):
    files = {
        "README.md": CONFIGS,
        "parts/1.csv": table(["01", "02"]),
        "parts/2.csv": table(["03"]),
        "held_out.csv": table(["04"]),
        "hard/test.jsonl": lines([{"prompt": "What?", "completion": "05"}]),
        "hard/train-1.jsonl": lines([{"prompt": "What?", "completion": "06"}]),
        "de.csv": 'prompt;completion\nWhat?;"0,7"\n',
        "unnamed.csv": "no,table",
    }
    hub.put_dataset("alice/configs", files)

    def labels(split, config=None):
        return [row["completion"] for row in read(open_rows("alice/configs", split, config))]

    assert labels("train") == ["01", "02", "03"]
    assert labels("train[1:]") == ["02", "03"]
    assert labels("validation") == ["04"]
    assert labels("test", "hard") == ["05"]
    assert labels("train", "hard") == ["06"]
    assert labels("train", "german") == ["0,7"]
    with pytest.raises(UserError, match="has no split 'test'; its files give train, validation"):
        labels("test")
    with pytest.raises(UserError, match=r"dataset_config: soft is not there; README.md names easy, hard, german"):
        labels("train", "soft")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"train.csv": "1", "val.csv": "2", "eval.csv": "3"}, {"train": "1", "validation": "2", "test": "3"}),
        ({"data/my-train-01.csv": "1", "data/my-dev.csv": "2"}, {"train": "1", "validation": "2"}),
        ({"training/a.csv": "1", "testing/a.csv": "2"}, {"train": "1", "test": "2"}),
        ({"data/odd-00000-of-00001.csv": "1"}, {"odd": "1"}),
        ({"anything.csv": "1"}, {"train": "1"}),
    ],
)
def test_names_say_which_files_make_which_split_as_in_datasets(files, splits, hub):
    hub.put_dataset("alice/names", {name: table([label]) for name, label in files.items()})
    found = load_dataset_builder("alice/names").config.data_files
    theirs = {str(split): [files[path.split("/", 5)[-1]] for path in paths] for split, paths in found.items()}
    assert theirs == {split: [label] for split, label in splits.items()}
    for split, label in splits.items():
        assert [row["completion"] for row in read(open_rows("alice/names", split))] == [label]
    with pytest.raises(UserError, match="has no split 'other'"):
        open_rows("alice/names", "other")


CLASSES = """---
dataset_info:
  features:
  - {name: prompt, dtype: string}
  - name: completion
    dtype:
      class_label:
        names: {'0': red, '1': dark blue}
---
"""


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_of_classes_are_their_names(kind, hub, tmp_path):
    found = {
        "csv": table(["1", "0", "red"]),
        "jsonl": lines({"prompt": "?", "completion": label} for label in (1, 0, "red")),
    }
    files = {"README.md": CLASSES, f"train.{kind}": found[kind]}
    hub.put_dataset("alice/classes", files)
    (tmp_path / "local").mkdir()
    for name, text in files.items():
        (tmp_path / "local" / name).write_text(text)
    for name in ("alice/classes", str(tmp_path / "local")):
        rows = read(open_rows(name, "train"))
        assert [row["completion"] for row in rows] == ["dark blue", "red", "red"]
    other = table(["2"]) if kind == "csv" else lines([{"prompt": "?", "completion": 2}])
    hub.put_dataset("alice/classes", files | {f"train.{kind}": other})
    with pytest.raises(UserError, match=r"has '?2'? among its classes, which README.md names otherwise"):
        open_rows("alice/classes", "train")


def test_a_branch_a_commit_and_what_the_cache_holds(hub, monkeypatch):
    hub.put_dataset("alice/moved", {"train.csv": table(["01"])})
    old = json.loads(hub.get("/api/datasets/alice/moved"))["sha"]
    hub.put_dataset("alice/moved", {"train.csv": table(["02"])})
    hub.put_dataset("alice/moved", {"train.csv": table(["03"])}, branch="v3")

    def labels(revision=None):
        return [row["completion"] for row in read(open_rows("alice/moved", "train", revision=revision))]

    assert [labels(revision) for revision in (None, old, "v3")] == [["02"], ["01"], ["03"]]
    assert open_rows("alice/moved", "train[:1]", revision=old).select([0]).commit == old
    with pytest.raises(UserError, match="revision v4: has no such branch, tag or commit; check dataset_revision"):
        labels("v4")
    hub.put_dataset("alice/moved", {"train.csv": table(["04"])})
    hub.log()
    set_offline(True, monkeypatch)
    assert [labels(revision) for revision in (None, old, "v3")] == [["02"], ["01"], ["03"]]
    assert hub.log() == []


def test_a_hub_out_of_reach_is_replaced_by_the_cache_and_told(hub, monkeypatch, caplog):
    hub.put_dataset("alice/away", {"train.csv": table(["007"]), "test.csv": table(["1"])})
    assert read(open_rows("alice/away", "train"))[0]["completion"] == "007"

    def refuse(*args, **kwargs):
        raise httpx.ConnectError("no route")

    with monkeypatch.context() as context, caplog.at_level(logging.WARNING):
        context.setattr(httpx.Client, "send", refuse)
        assert read(open_rows("alice/away", "train"))[0]["completion"] == "007"
    assert "dataset alice/away: the Hub is out of reach; its files in the cache are used, of commit" in caplog.text
    set_offline(True, monkeypatch)
    with pytest.raises(UserError, match="has no split 'test'; its files give train"):
        open_rows("alice/away", "test")


def test_datasets_that_cannot_be_read_are_told_in_one_message(hub, monkeypatch):
    hub.put_dataset("bob/private", {"train.csv": table(["1"])}, private=True)
    hub.put_dataset("bob/gated", {"train.csv": table(["1"])}, gated=True)
    hub.put_dataset("alice/script", {"train.csv": table(["1"]), "script.py": "import datasets"})
    hub.put_dataset("alice/packed", {"train.jsonl.zst": b"\x28\xb5\x2f\xfd"})
    hub.put_dataset("alice/twice", {"train.jsonl": lines([turns("a")]), "train.json": json.dumps([turns("a")])})
    hub.put_dataset("alice/both", {"train.jsonl": lines([turns("a")]), "train.csv": table(["a"])})
    hub.put_dataset(
        "alice/field",
        {"README.md": "---\nconfigs:\n- {config_name: a, data_files: a.json, field: data}\n---\n", "a.json": "{}"},
    )
    hub.put_dataset("alice/tars", {"train-000.tar": tar_of({"1.jpg": png("red"), "1.json": b"{}"})})
    hub.put_dataset("alice/empty", {"README.md": "# Nothing yet"})
    told = {
        "alice/missing": "dataset alice/missing: is not on the Hub, or is private; check the name, and log in",
        "bob/private": "dataset bob/private: is not on the Hub, or is private",
        "bob/gated": "dataset bob/gated: is gated; ask for access on its page at .*/datasets/bob/gated, and log in",
        "alice/script": r"is made by a script, script.py, which is not run; .* dataset_revision: refs/convert/parquet",
        "alice/packed": r"train.jsonl.zst is compressed otherwise than as .gz, .bz2 or .xz",
        "alice/twice": "a split has two files of one name, train.json and train.jsonl; keep one",
        "alice/tars": r"its rows lie in .tar archives \(WebDataset\), which are not read; write a line for each row",
        "alice/both": r"a split has two files of one name, train.\w+ and train.\w+; keep one",
        "alice/field": "README.md states field for its files, which is not read",
        "alice/empty": "has no split 'train'; its files give none",
        "no such folder/or/id": "is neither a local folder or file, nor a Hub id",
    }
    for name, message in told.items():
        with pytest.raises(UserError, match=message) as error:
            open_rows(name, "train")
        assert "\n" not in str(error.value)
    set_offline(True, monkeypatch)
    with pytest.raises(UserError, match="dataset alice/never, split train: cannot be loaded"):
        open_rows("alice/never", "train")


def test_parquet_is_left_to_datasets_and_its_cache(hub, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["?"], "completion": ["00501"]}), tmp_path / "a.parquet")
    hub.put_dataset(
        "alice/typed", {"data/train-00000-of-00001.parquet": (tmp_path / "a.parquet").read_bytes(), "notes.json": "{}"}
    )
    assert read(open_rows("alice/typed", "train"))[0]["completion"] == "00501"
    with pytest.raises(UserError, match=r"BuilderConfig 'old' not found"):  # as datasets tells it
        open_rows("alice/typed", "train", "old")
    for snapshot in (tmp_path / "cache/datasets--alice--typed/snapshots").iterdir():
        shutil.rmtree(snapshot / "data")
    set_offline(True, monkeypatch)
    assert read(open_rows("alice/typed", "train"))[0]["completion"] == "00501"


def test_a_file_whose_name_fits_two_patterns_is_read_once(hub, tmp_path):
    """By load_dataset its rows come twice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, answers in (("train/train2017/a", ["1", "2"]), ("val/val2017/a", ["3"])):
        (tmp_path / "local" / name).parent.mkdir(parents=True)
        rows = {"prompt": ["?"] * len(answers), "completion": answers}
        pq.write_table(pa.table(rows), tmp_path / "local" / f"{name}.parquet")
        (tmp_path / "text" / name).parent.mkdir(parents=True)
        (tmp_path / "text" / f"{name}.csv").write_text(table(answers))
    for kind in ("local", "text"):
        files = [path for path in (tmp_path / kind).rglob("*") if path.is_file()]
        hub.put_dataset(f"alice/{kind}", {str(path.relative_to(tmp_path / kind)): path.read_bytes() for path in files})
        for name, streaming in itertools.product((str(tmp_path / kind), f"alice/{kind}"), (False, True)):
            for split, wanted in (("train", ["1", "2"]), ("validation", ["3"])):
                assert [row["completion"] for row in read(open_rows(name, split, streaming=streaming))] == wanted


def test_a_downloaded_folder_is_read_as_on_the_hub(tmp_path):
    files = {
        "README.md": CONFIGS,
        "parts/1.csv": table(["01"]),
        "parts/2.csv": table(["02"]),
        "held_out.csv": table(["03"]),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for split, labels in (("train", ["01", "02"]), ("validation", ["03"])):
        assert [row["completion"] for row in read(open_rows(str(tmp_path), split))] == labels
    assert [row["completion"] for row in read(open_rows(str(tmp_path), "held_out"))] == ["03"]


def test_rows_of_conversations_keep_their_images_by_name(hub):
    row = conversation_row("<image>What?", "red", images=("images/red.png",))
    hub.put_dataset("alice/named", {"train.jsonl": lines([row]), "images/red.png": png("red")})
    rows = open_rows("alice/named", "train")
    assert rows.conversation({"row": 0}).media[0].decode().getpixel((0, 0)) == (255, 0, 0)
