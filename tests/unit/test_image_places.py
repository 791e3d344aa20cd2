"""Images lie beside rows, in a stated folder, or in archives; what is no image yet is told by its name."""

import io
import itertools
import json
import pickle
import sys
import tarfile
import types
import zipfile

import pytest

from fixtures.messages import RED, conversation_row, png, write_messages
from qwen_vl_sft.config.settings import DataSettings
from qwen_vl_sft.data.dataset import open_rows, open_split
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import BadRow, UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HEIC = b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic" + 300 * b"\0"
AVIF = b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1avif" + 300 * b"\0"


def color(conversation):
    return conversation.media[0].decode().getpixel((0, 0))


def write_zip(path, **colors):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._red.png", b"x")
        for name, content in colors.items():
            archive.writestr(name, png(content) if len(content) < 9 else content)


def write_tar(path, **colors):
    with tarfile.open(path, "w") as archive:
        for name, content in colors.items():
            data = png(content) if len(content) < 9 else content.encode()
            entry = tarfile.TarInfo(f"./{name}" if "./" not in name else name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def opened(folder, split="train", streaming=False, **keys):
    rows = open_rows(str(folder), split, streaming=streaming, **keys)
    return [(rows.conversation(row).last_answer, color(rows.conversation(row))) for row in rows.dataset]


WANTED = [("red", (255, 0, 0)), ("blue", (0, 0, 255))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "metadata.csv"])
def test_images_may_lie_in_another_folder(form, streaming, tmp_path):
    from datasets import Dataset

    images, folder = tmp_path / "pictures", tmp_path / "rows"
    write_messages(images, [])
    folder.mkdir()
    name = "file_name" if form == "metadata.csv" else "image"
    rows = [{name: f"images/{answer}.png", "query": "?", "label": answer} for answer in ("red", "blue")]
    if form == "jsonl":
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif form == "parquet":
        Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / ("metadata.csv" if "metadata" in form else "train.csv")).write_text("\n".join(lines))
    assert opened(folder, streaming=streaming, image_folder=str(images)) == WANTED
    data = DataSettings(dataset_name=str(folder), image_folder=str(images), dataset_streaming=streaming)
    assert color(open_split(data, "train").conversation(next(iter(open_split(data, "train").dataset)))) == (255, 0, 0)
    with pytest.raises(UserError, match=r"image_folder: .*nowhere is no folder here"):
        open_rows(str(folder), "train", image_folder=str(tmp_path / "nowhere"))


def test_an_image_folder_is_not_left_either(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    rows = [{"image": name, "query": "?", "label": "x"} for name in ("../secret.png", str(tmp_path / "secret.png"))]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "images").mkdir()
    found = open_rows(str(tmp_path), "train", image_folder=str(tmp_path / "images"))
    for row in found.dataset:
        with pytest.raises(BadRow, match=r"which lies outside the data folder .*images"):
            found.conversation(row)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("table", "place"),
    [
        *itertools.product(
            ("metadata.csv", "metadata.jsonl", "train.jsonl", "train.csv"),
            ("beside", "in a folder", "own folder", "named"),
        ),
        ("metadata.csv", "inside"),
        ("metadata.jsonl", "inside"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_packed_images_are_read_where_they_would_be_unpacked(table, place, streaming, kind, tmp_path):
    prefix = {"in a folder": "charts/", "own folder": "images/", "named": f"images.{kind}/"}.get(place, "")
    rows = [
        {"file_name" if "metadata" in table else "image": f"{prefix}{answer}.png", "query": "?", "label": answer}
        for answer in ("red", "blue")
    ]
    if table.endswith("csv"):
        text = "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)])
    else:
        text = "\n".join(map(json.dumps, rows))
    inner = "charts/" if place == "in a folder" else ""
    inside = {table: text} if place == "inside" else {}
    write = write_zip if kind == "zip" else write_tar
    write(tmp_path / f"images.{kind}", **{f"{inner}red.png": "red", f"{inner}blue.png": "blue"}, **inside)
    if not inside:
        (tmp_path / table).write_text(text)
    assert opened(tmp_path, streaming=streaming) == WANTED


def test_other_archives_are_told_by_their_names(tmp_path):
    row = {"image": "charts/red.png", "query": "?", "label": "x"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    for name in ("images.tar.gz", "images.7z", "charts.rar"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(
            BadRow, match=rf"{name} is an archive that is not read: unpack it, or pack it again as .zip"
        ):
            open_rows(str(tmp_path), "train").conversation({"row": 0})
        (tmp_path / name).unlink()
    write_tar(tmp_path / "whole.tar", **{"charts/red.png": "red"})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:600])
    (tmp_path / "whole.tar").unlink()
    with pytest.raises(BadRow, match=r"cut.tar (ends before|is no tar archive)"):
        open_rows(str(tmp_path), "train").conversation({"row": 0})


def test_rows_in_tar_archives_are_refused_by_that_word(tmp_path):
    samples = {"1.png": "red", "1.json": '{"query": "?", "label": "x"}', "2.png": "blue", "2.json": '{"query": "?"}'}
    write_tar(tmp_path / "train-00000.tar", **samples)
    with pytest.raises(
        UserError, match=r"its rows lie in .tar archives \(WebDataset\), which are not read; write a line"
    ):
        open_rows(str(tmp_path), "train")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "2.png", "query": "?", "label": "blue"}))
    assert opened(tmp_path) == WANTED[1:]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_may_lie_among_the_images_of_their_split(streaming, tmp_path):
    for split, answer in (("train", "red"), ("test", "blue")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(png(answer))
        row = {"image": f"{split}/a.png", "query": "?", "label": answer}
        (tmp_path / split / "rows.jsonl").write_text(json.dumps(row))
    assert [opened(tmp_path, split, streaming)[0] for split in ("train", "test")] == WANTED


def test_an_archive_is_read_by_several_processes(tmp_path):
    import multiprocessing

    write_zip(tmp_path / "a.zip", **{f"{number}.png": "red" for number in range(50)})
    rows = [{"image": f"{number}.png", "query": "?", "label": "x"} for number in range(50)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_rows(str(tmp_path), "train")
    files = [found.conversation(row).media[0] for row in found.dataset]
    assert pickle.loads(pickle.dumps(files[0])).read() == png()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(ImageFile.read, files, chunksize=1) == [png()] * 50


def test_rows_are_checked_again_when_an_archive_changes(tiny_processor, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "red.png", "query": "?", "label": "x"}))
    found = {}
    for number, content in enumerate((None, "red", 20 * "x", "blue")):
        if content:
            write_zip(tmp_path / "a.zip", **{"red.png": content})
        try:
            found[number] = len(scan(open_rows(str(tmp_path), "train"), Encoder(tiny_processor)).rows)
        except UserError as error:
            found[number] = str(error)
    assert "red.png does not exist" in found[0]
    assert "a.zip/red.png cannot be read" in found[2]
    assert (found[1], found[3]) == (1, 1)


def test_splits_of_archives_under_one_table(tmp_path):
    write_zip(tmp_path / "train.zip", **{"a.png": "red", "b.png": "blue"})
    write_zip(tmp_path / "test.zip", **{"c.png": "blue"})
    lines = ["file_name,query,label", "b.png,?,01", "c.png,?,02", "a.png,?,03", ",text only?,04"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    labels = [row["label"] for row in open_rows(str(tmp_path), "train").dataset]
    assert labels == ["01", "03", "04"]
    assert [row["label"] for row in open_rows(str(tmp_path), "test").dataset] == ["02", "04"]
    with pytest.raises(UserError, match=r"has no split 'val'; its files give (train, test|test, train)"):
        open_rows(str(tmp_path), "val")


def test_faults_of_archives_are_told(tmp_path):
    for name in ("a", "b"):
        write_zip(tmp_path / f"{name}.zip", **{"red.png": "red", "bad.png": 20 * "x"})
    rows = [{"image": name, "query": "?", "label": "x"} for name in ("red.png", "a/red.png", "c.png", "a.zip/bad.png")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_rows(str(tmp_path), "train")
    assert color(found.conversation({"row": 1})) == (255, 0, 0)
    with pytest.raises(BadRow, match=r"red.png, which is there twice, as a.zip/red.png and b.zip/red.png; name it so"):
        found.conversation({"row": 0})
    with pytest.raises(BadRow, match=r"image file .*c.png does not exist"):
        found.conversation({"row": 2}).media[0].open()
    with pytest.raises(BadRow, match=r"a.zip/bad.png cannot be read"):
        found.conversation({"row": 3}).media[0].open()
    with pytest.raises(BadRow, match=r"a.zip/none.png does not exist"):
        _ = ImageFile(None, str(tmp_path / "a.zip/none.png")).content_hash
    for content, told in ((b"x", "a.zip is no zip archive"), (POINTER, "a.zip is a Git LFS pointer")):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(BadRow, match=told):
            found.conversation({"row": 2})


def test_images_that_are_pointers_of_git_lfs_are_told(messages_folder):
    folder = messages_folder([conversation_row()])
    (folder / RED).write_bytes(POINTER)
    rows = open_rows(str(folder), "train")
    with pytest.raises(BadRow, match=r"red.png is a Git LFS pointer, not the image; fetch the files with git lfs pull"):
        rows.conversation({"row": 0}).media[0].open()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("file", ["train.jsonl", "train.json", "train.csv", "train.jsonl.gz", "train.parquet"])
def test_data_files_that_are_pointers_of_git_lfs_are_told(file, streaming, tmp_path):
    (tmp_path / file).write_bytes(POINTER)
    for name in (tmp_path, tmp_path / file):
        with pytest.raises(UserError, match=f"{file} is a Git LFS pointer, not the file itself; fetch"):
            open_rows(str(name), "train", streaming=streaming)


def test_heic_is_read_where_its_reader_is_installed(monkeypatch):
    from PIL import Image

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadRow, match="is HEIC, which is read where pillow-heif is installed"):
        ImageFile(HEIC, None).open()
    with pytest.raises(BadRow, match="cannot be read"):
        ImageFile(AVIF, None).open()

    def register_heif_opener():
        Image.register_open(
            "HEIF", lambda file, name: Image.new("RGB", (8, 4), "red"), lambda head: b"heic" in HEIC[:32]
        )

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    assert ImageFile(HEIC, None).decode().size == (8, 4)
