import base64
import contextlib
import json

import pytest

from fixtures.messages import conversation_row, png, write_messages
from qwen_vl_sft.data.dataset import in_memory, open_rows, select_evenly
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats import FORMATS
from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE, accepted_answers
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.errors import BadRow, UserError

RED = {"bytes": png("red"), "path": None}


def chartqa_row(**changes):
    return {"image": RED, "query": "Which color?", "label": ["red", "crimson"], **changes}


def test_chartqa_takes_the_first_label():
    conversation = FORMATS["chartqa"].read(chartqa_row(), None)
    assert conversation.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which color?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    assert conversation.media[0].open().size == (56, 56)


@pytest.mark.parametrize(
    ("label", "answers"),
    [
        (5, ["5"]),
        (5.0, ["5"]),
        (-0.25, ["-0.25"]),
        ([2019, "2019.0", None, " ", float("nan")], ["2019", "2019.0"]),
        (" x", [" x"]),
    ],
)
def test_numbers_in_a_row_are_text(label, answers):
    row = chartqa_row(query=7, label=label)
    question, answer = FORMATS["chartqa"].read(row, None).messages
    assert [question["content"][1]["text"], answer["content"][0]["text"]] == ["7", answers[0]]
    assert accepted_answers(row) == answers
    turns = [{"role": "user", "content": [{"type": "text", "text": 1.5}]}, {"role": "assistant", "content": 3.0}]
    messages = FORMATS["messages"].read({"messages": turns}, None).messages
    assert [message["content"] for message in messages] == [[{"type": "text", "text": text}] for text in ("1.5", "3")]


def test_messages_split_at_placeholders(tmp_path):
    row = conversation_row("Is <image> like <image>?", images=("a.png", "b.png"))
    conversation = FORMATS["messages"].read(row, tmp_path)
    kinds = [part["type"] for part in conversation.messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert conversation.media[1].path == str(tmp_path / "b.png")


PLAIN = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize("images", [{"image": "a.png"}, {"image": "a.png", "images": []}, {"image": {"path": "a.png"}}])
def test_a_single_image_is_put_before_the_first_question_as_trl_does_it(images, tmp_path):
    conversation = FORMATS["messages"].read({"messages": PLAIN, **images}, tmp_path)
    assert conversation.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert [image.path for image in conversation.media] == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    "image",
    [
        "a.png",
        {"url": "a.png"},
        {"path": "a.png", "bytes": None},
        {"bytes": base64.b64encode(png("red")).decode(), "path": "elsewhere.png"},
    ],
)
def test_lists_may_be_written_as_json_text_as_tables_hold_them(image, tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    for name, rows in (("messages", PLAIN), ("conversations", turns)):
        for images in ([image], json.dumps([image])):
            conversation = FORMATS[name].read({name: json.dumps(rows), "images": images}, tmp_path)
            assert conversation.last_answer == "red"
            assert [file.decode().getpixel((0, 0)) for file in conversation.media] == [(255, 0, 0)]


def test_objects_may_be_written_as_json_text(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    objects = {"ref": ["bar"], "bbox": [[1, 2, 3, 4]]}
    row = conversation_row("<image>Where is <ref-object>?", "<bbox>", images=("a.png",))
    found = [FORMATS["messages"].read(row | {"objects": entry}, tmp_path) for entry in (objects, json.dumps(objects))]
    assert found[0].messages == found[1].messages


def test_a_single_image_is_shown_where_it_says(tmp_path):
    row = {**conversation_row("What is <image>?"), "images": None, "image": "a.png"}
    conversation = FORMATS["messages"].read(row, tmp_path)
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["text", "image", "text"]


@pytest.mark.parametrize("empty", [None, [], "", [None], {"bytes": None, "path": None}])
def test_empty_columns_of_what_is_not_read_do_not_matter(empty, tmp_path):
    conversation = FORMATS["messages"].read(
        {"messages": PLAIN, "videos": empty, "audio": empty, "image": empty}, tmp_path
    )
    assert conversation.media == []
    assert FORMATS["chartqa"].read(chartqa_row(videos=empty, images=empty), None).media


def test_an_answer_may_name_a_tag(tmp_path):
    row = conversation_row("<image>Which tag shows films?", "<video>")
    assert FORMATS["messages"].read(row, tmp_path).messages[1]["content"][0]["text"] == "<video>"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"videos": ["clip.mp4"]}, "has something in column videos, and only images are read"),
        ({"images": [RED]}, "has images in column images too"),
        ({"query": "<image>What?"}, "has <image> in its query"),
        ({"query": "<video>What?"}, "has <video> in a question"),
        ({"image": None}, "has no image"),
        ({"query": " "}, "has an empty query"),
        ({"label": []}, "has an empty answer"),
        ({"label": [""]}, "has an empty answer"),
        ({"label": None}, "has an empty answer"),
        ({"label": float("nan")}, "has an empty answer"),
        ({"label": True}, r"has neither text nor a number as its answer \(column label\): True"),
        ({"label": {"a": 1}}, "has neither text nor a number as its answer"),
        ({"query": ["What?"]}, "has neither text nor a number as its query"),
    ],
)
def test_bad_chartqa_rows(changes, told):
    with pytest.raises(BadRow, match=told):
        FORMATS["chartqa"].read(chartqa_row(**changes), None)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [], "images": []}, "has no messages"),
        ({"messages": [{"role": "user", "content": "hi"}], "images": []}, "has no assistant turn"),
        (conversation_row(answer="  "), "has an empty answer"),
        (conversation_row("<image><image>?"), r"has 2 image placeholder\(s\) in its messages but 1 image\(s\)"),
        (conversation_row(answer="<image>", images=("a", "b")), "image inside an assistant message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "content part of type 'video'"),
        (conversation_row(images=("../secret.png",)), "lies outside the data folder"),
        (conversation_row(images=("images/../../secret.png",)), "lies outside the data folder"),
        (
            conversation_row(images=("/etc/passwd",)),
            "lies outside the data folder .* or a link to their folder, into it",
        ),
        (conversation_row(images=(None,)), "missing image"),
        (conversation_row([{"type": "text", "text": None}]), "a content part of type 'text' without a text"),
        ({"messages": "hi"}, "not a list of turns"),
        ({"messages": [None, *PLAIN]}, "not a list of turns"),
        ({"messages": ["hi", *PLAIN]}, "not a list of turns"),
        ({"messages": {"role": ["user"], "content": ["hi"]}}, "not a list of turns"),
        (conversation_row(images=("a\0.png",)), "'a.x00.png', which is no path"),
        (conversation_row(images=({"bytes": "text"},)), "neither its bytes nor the name of a file, but"),
        ({"messages": PLAIN, "video": {"path": "clip.mp4"}}, "has something in column video,"),
        ({"messages": PLAIN, "audios": ["a.wav"]}, "has something in column audios,"),
        (conversation_row("<video>What?", images=()), "has <video> in a question"),
        (conversation_row([{"type": "text", "text": "<audio>What?"}], images=()), "has <audio> in a question"),
        (conversation_row([{"type": "text", "text": "<image>What?"}], images=()), "has <image> inside a text part"),
        (conversation_row([{"type": "image", "image": "a.png"}]), r"0 image placeholder\(s\) .* but 1 image"),
        (conversation_row([{"type": "image", "image": "a.png", "path": "b.png"}]), "its own image and path; keep one"),
        (conversation_row([{"type": "image", "max_pixels": 9}]), "a content part that brings its own max_pixels"),
        (conversation_row([{"type": "image", "url": "http://a.png"}]), "a content part that brings its own url"),
        ({**conversation_row(), "image": "b.png"}, "both a column image and a column images"),
        (
            conversation_row("A <image>?", images=("a.png", "b.png")),
            "1 image placeholder.* write <image> where each is",
        ),
        ({"messages": [{"role": "system", "content": "x"}, PLAIN[1]], "image": "a.png"}, "0 image placeholder"),
    ],
)
def test_bad_messages_rows(row, told, tmp_path):
    with pytest.raises(BadRow, match=told):
        FORMATS["messages"].read(row, tmp_path)


CONVERSATION = [
    {"from": "system", "value": "Be terse."},
    {"from": "human", "value": "<image>\nWhich color?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "And <image>?"},
    {"from": "gpt", "value": 0},
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["image", "images"])
def test_conversations_are_encoded_as_the_same_messages(streaming, column, tmp_path, tiny_processor):
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": str(turn["value"])} for turn in CONVERSATION]
    images = ["images/red.png", "images/blue.png"]
    found = []
    for name, row in (
        ("one", {"messages": turns, "images": images}),
        ("two", {"conversations": CONVERSATION, column: images}),
    ):
        opened = open_rows(str(write_messages(tmp_path / name, [row])), "train", streaming=streaming)
        encoder = Encoder(tiny_processor, opened.format.resolve_system_message(None))
        found.append((opened.format.name, opened.encode(next(iter(opened.dataset)), encoder)))
    (first, messages), (second, conversations) = found
    assert (first, second) == ("messages", "conversations")
    assert conversations.input_ids.tolist() == messages.input_ids.tolist()
    assert conversations.labels.tolist() == messages.labels.tolist()
    assert [image.content_hash for image in conversations.media] == [image.content_hash for image in messages.media]


def said(*turns, **columns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **columns}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (said(), "has no conversations"),
        ({"conversations": [None]}, "has no conversations, or some that are not a list of turns"),
        (
            said(("human", "?"), ("function_call", "{}"), ("observation", "1"), ("gpt", "x")),
            "a turn from 'function_call'",
        ),
        (said(("human", "?"), ("tool", "x")), "a turn from 'tool'; known are human, user, gpt, assistant, system"),
        (said(("human", "?"), (None, "x")), "a turn from 'None'"),
        (said(("human", "?"), ("gpt", ["x"])), "a turn from gpt whose value is neither text nor a number"),
        (said(("human", "?"), ("gpt", " ")), "has an empty answer"),
        (said(("human", "<video>?"), ("gpt", "x")), "has <video> in a question"),
        (said(("human", "<video>?"), ("gpt", "x"), video="a.mp4"), "has something in column video,"),
        (said(("human", "?"), ("gpt", "x"), tools="[{}]"), "has something in column tools"),
        (
            said(("system", "x"), ("human", "?"), ("gpt", "x"), system="Be terse."),
            "has a system message both in its turns and in column system",
        ),
        (said(("human", "<image>?"), ("gpt", "x")), r"has 1 image placeholder\(s\) in its messages but 0"),
        (said(("human", "<image>?"), ("gpt", "x"), image=["a", "b"]), r"has 1 image placeholder\(s\) .* but 2 image"),
    ],
)
def test_bad_conversations_rows(row, told, tmp_path):
    with pytest.raises(BadRow, match=told):
        FORMATS["conversations"].read(row, tmp_path)


def test_bad_images(tmp_path):
    with pytest.raises(BadRow, match=r"none\.png does not exist"):
        ImageFile(None, str(tmp_path / "none.png")).open()
    with pytest.raises(BadRow, match="cannot be read"):
        ImageFile(b"not an image", "a.png").open()
    whole = png("red", (300, 300))
    with pytest.raises(BadRow, match=r"image a\.png cannot be decoded"):
        ImageFile(whole[: len(whole) // 2], "a.png").decode()
    with pytest.raises(BadRow, match="more elongated than 200 to 1"):
        ImageFile(png("red", (401, 2)), None).open()


@pytest.mark.parametrize("error", [RuntimeError("bad box"), IndexError, AttributeError])
def test_whatever_the_reader_of_a_damaged_image_raises_is_told_of_the_row(error, monkeypatch):
    def damaged(*_):
        raise error

    file = ImageFile(png(), "a.avif")
    monkeypatch.setattr("PIL.Image.Image.load", damaged)
    with pytest.raises(BadRow, match=r"image a\.avif cannot be decoded \((bad box|IndexError|Attribute)"):
        file.decode()
    monkeypatch.setattr("PIL.Image.open", damaged)
    with pytest.raises(BadRow, match=r"image a\.avif cannot be read"):
        file.open()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_image_is_not_taken_for_one(error, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr("PIL.Image.Image.load", fails)
    with pytest.raises(error):
        ImageFile(png(), None).decode()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AVIF", "ICNS", "WEBP", "TIFF"])
def test_a_damaged_image_of_any_kind_can_be_read_or_is_a_bad_row(kind):
    import io
    import random

    from PIL import Image, features

    if kind in ("AVIF", "WEBP") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow reads no {kind}")
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, kind)
    draw = random.Random(0)
    for _ in range(100):
        data = bytearray(buffer.getvalue())
        for _ in range(5):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with contextlib.suppress(BadRow):
            ImageFile(bytes(data[: draw.randrange(1, len(data))]), None).decode()


def test_a_decompression_bomb_is_refused_by_its_header():
    with pytest.raises(BadRow, match="is refused"):
        ImageFile(_png_header(20_000, 20_000), "bomb.png").open()
    with pytest.raises(BadRow, match="is refused"):
        ImageFile(_png_header(10_000, 10_000), "large.png").open()


def _png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _saved(image, kind="PNG", **options) -> ImageFile:
    import io

    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ImageFile(buffer.getvalue(), None)


def test_transparency_is_shown_over_white():
    from PIL import Image

    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    palette, white = Image.new("P", (2, 2)), (255, 255, 255)
    palette.putpalette([0, 0, 0])
    assert _saved(clear).decode().getpixel((0, 0)) == white
    assert _saved(clear.convert("LA")).decode().getpixel((0, 0)) == white
    assert _saved(palette, transparency=0).decode().getpixel((0, 0)) == white
    assert _saved(Image.new("RGB", (2, 2)), transparency=(0, 0, 0)).decode().getpixel((0, 0)) == white
    assert _saved(Image.new("RGBA", (2, 2), (0, 0, 0, 255))).decode().getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation):
    from datasets import Image as Column
    from PIL import Image

    photo, exif = Image.radial_gradient("L").resize((112, 56)).convert("RGB"), Image.Exif()
    photo.paste((255, 0, 0), (0, 0, 28, 28))
    exif[0x0112] = orientation
    file = _saved(photo, "JPEG", exif=exif)
    found = file.decode()
    assert found.size == ((112, 56) if orientation < 5 else (56, 112))
    assert found.tobytes() == Column().decode_example({"bytes": file.data, "path": None}).tobytes()


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0"])
def test_an_image_with_damaged_exif_data_is_as_it_lies(exif):
    from PIL import Image

    assert _saved(Image.new("RGB", (112, 56)), exif=exif).decode().size == (112, 56)


def test_16_bits_of_grey_are_scaled_and_numbers_without_a_range_refused():
    import numpy as np
    from PIL import Image

    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        found = _saved(Image.fromarray(grey * 257), kind).decode()
        assert (np.asarray(found) == grey[:, :, None]).all()
    for mode in ("I", "F"):
        with pytest.raises(BadRow, match="its pixels are numbers of 32 bits"):
            _saved(Image.new(mode, (2, 2)), "TIFF").open()


def test_jsonl_beside_an_image_folder(messages_folder):
    folder = messages_folder([conversation_row(), conversation_row(answer="blue", images=("images/blue.png",))])
    for name in (folder, folder / "train.jsonl"):
        rows = open_rows(str(name), "train")
        assert (rows.format.name, len(rows)) == ("messages", 2)
        image = rows.conversation({"row": 1}).media[0].decode()
        assert image.getpixel((0, 0)) == (0, 0, 255)


def test_image_folder(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (56, 56), "red").save(tmp_path / split / "a.png")
        entry = {"file_name": "a.png", "query": "Which color?", "label": "red"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    rows = open_rows(str(tmp_path), "test")
    assert rows.format.name == "chartqa"
    assert rows.conversation({"row": 0}).media[0].decode().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_images_may_be_linked_into_the_folder(streaming, linked, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/red.png").write_bytes(png("red"))
    (tmp_path / "secret.png").write_bytes(png("blue"))
    snapshot = tmp_path / "snapshots/abc"
    (snapshot / "images").mkdir(parents=True)
    (snapshot / "images/0.png").symlink_to("../../../blobs/red.png")
    (snapshot / "all").symlink_to(tmp_path / "blobs")
    (tmp_path / "data").symlink_to(snapshot)
    folder = tmp_path / "data" if linked else snapshot
    images = ["images/0.png", "all/red.png", str(folder / "all/red.png"), "all/../images/0.png", "all/../secret.png"]
    (snapshot / "train.jsonl").write_text("".join(f"{json.dumps(chartqa_row(image=name))}\n" for name in images))
    rows = open_rows(str(folder), "train", streaming=streaming)
    *good, bad = [rows.conversation(row).media[0] for row in rows.dataset]
    assert [image.decode().getpixel((0, 0)) for image in good] == [(255, 0, 0)] * 4
    with pytest.raises(BadRow, match="does not exist"):  # and not the one beside what the link leads to
        bad.open()


def test_an_image_folder_may_hold_links(tmp_path):
    (tmp_path / "red.png").write_bytes(png("red"))
    folder = tmp_path / "data/train"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to(tmp_path / "red.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "query": "?", "label": "red"}) + "\n")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    for name in ("data", "linked"):
        rows = open_rows(str(tmp_path / name), "train")
        assert rows.conversation({"row": 0}).media[0].decode().getpixel((0, 0)) == (255, 0, 0)


def test_slices_shuffle_and_cap(messages_folder):
    folder = messages_folder([conversation_row(answer=str(number)) for number in range(20)])
    assert len(open_rows(str(folder), "train[:10%]")) == 2
    ids = open_rows(str(folder), "train", shuffle_seed=3, max_rows=5).dataset["row_id"]
    assert list(ids) == list(open_rows(str(folder), "train", shuffle_seed=3, max_rows=5).dataset["row_id"])
    assert list(ids) != list(range(5))


def test_a_cap_of_evaluation_rows_is_spread_over_the_split(messages_folder):
    rows = open_rows(str(messages_folder([conversation_row(answer=str(number)) for number in range(10)])), "train")
    assert list(select_evenly(rows, 4).dataset["row_id"]) == [0, 2, 5, 7]
    assert len(select_evenly(rows, 20)) == len(select_evenly(rows, None)) == 10


def test_streaming(messages_folder):
    folder = messages_folder([conversation_row(answer=str(number)) for number in range(9)])
    rows = open_rows(str(folder), "train[2:6]", streaming=True, max_rows=3)
    items = list(rows.dataset)
    assert [item["row_id"] for item in items] == [2, 3, 4]
    assert rows.conversation(items[0]).messages[1]["content"][0]["text"] == "2"
    with pytest.raises(UserError, match="takes row slices only"):
        open_rows(str(folder), "train[:10%]", streaming=True)


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Ten rows of chartqa in two files."""
    from datasets import Dataset, Features, Image, Value

    folder = tmp_path_factory.mktemp("two")
    features = Features({"image": Image(), "query": Value("string"), "label": Value("string")})
    for file in range(2):
        rows = [{"image": RED, "query": f"{5 * file + number}", "label": "x"} for number in range(5)]
        Dataset.from_list(rows, features=features).to_parquet(folder / f"train-0000{file}-of-00002.parquet")
    return str(folder)


def read_by(workers, rows):
    from torch.utils.data import DataLoader

    batches = DataLoader(rows.dataset, batch_size=2, num_workers=workers, collate_fn=list)
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_of_several_files_is_the_same_for_any_number_of_workers(workers, two_files):
    rows = open_rows(two_files, "train[3:9]", streaming=True, max_rows=5)
    found = read_by(workers, rows)
    assert [(row["query"], row["row_id"]) for row in found] == [(str(place), place) for place in range(3, 8)]
    assert rows.conversation(found[0]).media[0].decode().size == (56, 56)
    whole = read_by(workers, open_rows(two_files, "train", streaming=True))
    assert [row["row_id"] for row in whole] == list(range(10))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_shuffled_stream_of_several_files_gives_each_row_an_id_of_its_own(workers, two_files):
    mixed = read_by(workers, open_rows(two_files, "train", streaming=True, shuffle_seed=1))
    assert [row["row_id"] for row in mixed] == list(range(10))
    assert sorted(row["query"] for row in mixed) == [str(place) for place in range(10)]
    assert [row["query"] for row in mixed] != [str(place) for place in range(10)]
    part = read_by(workers, open_rows(two_files, "train[3:9]", streaming=True, shuffle_seed=1))
    assert sorted((row["query"], row["row_id"]) for row in part) == [(str(place), place) for place in range(3, 9)]


@pytest.mark.parametrize(
    ("name", "split", "told"),
    [
        ("./nowhere", "train", "does not exist here"),
        ("nowhere.jsonl", "train", "does not exist here"),
        ("{folder}", "test", "has no split 'test'; its files give train"),
        ("{folder}/images/red.png", "train", "is none of"),
        ("{folder}", "train[:5", "cannot be loaded"),
    ],
)
def test_datasets_that_cannot_be_opened(messages_folder, name, split, told):
    folder = messages_folder([conversation_row()])
    with pytest.raises(UserError, match=told):
        open_rows(name.format(folder=folder), split)


def test_a_hub_id_that_is_the_name_of_a_format_is_told_as_any_other(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    with pytest.raises(UserError, match=r"dataset json, split train: cannot be loaded: no network"):
        open_rows("json", "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_text_of_the_hub_whose_types_were_guessed_before_is_refused(streaming, tmp_path, monkeypatch):
    """Without a network, and with what an earlier version has left in the cache of `datasets`."""
    from datasets import load_dataset

    (tmp_path / "train.csv").write_text("image,query,label\na.png,?,00501\n")

    def from_the_cache(**arguments):
        return load_dataset("csv", data_files=str(tmp_path / "train.csv"), split="train", streaming=streaming)

    monkeypatch.setattr("datasets.load_dataset", from_the_cache)
    with pytest.raises(
        UserError, match=r"dataset me/charts: the cache of datasets has it as CSV whose types were guessed"
    ):
        open_rows("me/charts", "train", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("file", "own", "others"),
    [
        ("one.jsonl", "train", ("test", "tset", "one", "validation[:1]")),
        ("val.jsonl", "val", ("train", "test")),
        ("test-00000-of-00001.jsonl", "test", ("train",)),
        ("test_old.jsonl", "train", ("test",)),
    ],
)
def test_a_single_file_is_one_split(streaming, file, own, others, messages_folder):
    path = messages_folder([conversation_row(answer=str(number)) for number in range(4)]) / "train.jsonl"
    path = path.rename(path.with_name(file))
    assert [row["row_id"] for row in open_rows(str(path), own, streaming=streaming).dataset] == [0, 1, 2, 3]
    part = open_rows(str(path), f"{own}[2:]", streaming=streaming)
    assert [row["messages"][1]["content"] for row in part.dataset] == ["2", "3"]
    for split in others:
        with pytest.raises(
            UserError, match=rf"has no split .* one split, this one '{own}'.* {own}\[90%:\], or give a folder"
        ):
            open_rows(str(path), split, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_files_of_a_folder_are_left_alone(streaming, messages_folder):
    folder = messages_folder([conversation_row()])
    (folder / "test.jsonl").write_text("broken")
    (folder / "info.json").write_text('{"other": {"file_name": "train.jsonl"}}')
    assert open_rows(str(folder), "train", streaming=streaming).format.name == "messages"
    with pytest.raises(UserError, match="has no split 'val'; its files give info, test, train"):
        open_rows(str(folder), "val", streaming=streaming)
    (folder / "train.json").write_text("[]")
    with pytest.raises(UserError, match=r"split 'train' has two files, train\.json and train\.jsonl; keep one"):
        open_rows(str(folder), "train", streaming=streaming)


GOOD_LINE = json.dumps({"messages": PLAIN})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("file", "data", "told"),
    [
        (
            "train.jsonl",
            f'{GOOD_LINE}\n\n{{"messages": [\n'.encode(),
            r"is no JSON \(line 3, column 15: Expecting value",
        ),
        ("train.jsonl", f"{GOOD_LINE[1:]}\n{GOOD_LINE}\n".encode(), r"is no JSON \(line 1, column 11"),
        ("train.jsonl", f"{GOOD_LINE}\n5\n".encode(), "holds no row in line 2, but 5"),
        ("train.json", b"[\n {},\n {]\n", r"is no JSON \(line 3, column 3"),
        (
            "train.jsonl",
            f"{GOOD_LINE}\n{GOOD_LINE}\n".replace("red", "größer").encode("latin-1"),
            r"no UTF-8 text \(line 1,",
        ),
        ("train.jsonl", b"", "is empty"),
        ("train.jsonl", b"\n \n", "(is empty|holds no rows)"),
        ("train.parquet", b"PAR1", "Parquet"),
    ],
)
def test_a_broken_file_is_told_with_its_line(streaming, file, data, told, tmp_path):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError, match=told):
        list(open_rows(str(tmp_path), "train", streaming=streaming).dataset)


def test_a_stream_that_breaks_later_is_told(messages_folder):
    # datasets reads ten megabytes at a time.
    folder = messages_folder([conversation_row(answer=100_000 * "x") for _ in range(110)])
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": 1')
    rows = open_rows(str(folder), "train", streaming=True)
    for read in (lambda: list(rows.dataset), lambda: in_memory(rows)):
        with pytest.raises(UserError, match=r"train.jsonl is no JSON \(line 111, column 15"):
            read()


def test_columns_of_no_format(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"columns \['text'\] fit no format .*; write the turns of text as messages"):
        open_rows(str(tmp_path), "train")
    with pytest.raises(UserError, match="dataset_format chartqa needs the column"):
        open_rows(str(tmp_path), "train", row_format="chartqa")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_named_row_id_is_not_the_place_of_a_row(streaming, messages_folder):
    folder = messages_folder([{**conversation_row(), "row_id": f"chart {number}"} for number in range(3)])
    rows = open_rows(str(folder), "train", streaming=streaming)
    assert [row["row_id"] for row in rows.dataset] == [0, 1, 2]


def test_videos_and_sounds_are_not_decoded_to_be_refused(tmp_path):
    from datasets import Audio, Dataset, Features, List, Value, Video

    turns = List({"role": Value("string"), "content": Value("string")})
    features = Features({"messages": turns, "videos": List(Video()), "audio": Audio()})
    values = [{"messages": PLAIN, "videos": [{"bytes": b"film", "path": None}], "audio": None}]
    Dataset.from_list(values, features=features).to_parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        rows = open_rows(str(tmp_path / "train.parquet"), "train", streaming=streaming)
        with pytest.raises(BadRow, match=r"row 0 has something in column videos"):
            rows.conversation(next(iter(rows.dataset)))


def test_a_bad_row_is_named(messages_folder):
    rows = open_rows(str(messages_folder([conversation_row(), conversation_row(answer="")])), "train")
    with pytest.raises(BadRow, match=r"data \[train\], row 1 has an empty answer"):
        rows.conversation({"row": 1})


def test_real_data(shared):
    assert open_rows(str(shared / "chartqa"), "train[:10%]").format.name == "chartqa"
    assert open_rows(str(shared / "multichart"), "train").format.name == "messages"
    rows = open_rows(str(shared / "opencqa"), "train[:3]")
    assert rows.conversation({"row": 2}).media[0].decode().width > 100


def test_the_tutorials_system_message():
    assert CHARTQA_SYSTEM_MESSAGE.count("\n") == 3
    assert CHARTQA_SYSTEM_MESSAGE.startswith("You are a Vision Language Model specialized in interpreting")
    assert CHARTQA_SYSTEM_MESSAGE.endswith("Avoid additional explanation unless absolutely necessary.")


def test_keys_of_the_hub_that_have_no_effect_on_a_folder_are_told(messages_folder, caplog):
    folder = messages_folder([conversation_row()])
    assert len(open_rows(str(folder), "train", config="charts", revision="v2")) == 1
    assert "dataset_config: charts is not used" in caplog.text
    assert "dataset_revision: v2 is not used" in caplog.text


def test_files_that_are_missing_by_the_names_of_others_are_told(messages_folder, caplog):
    folder = messages_folder([conversation_row()])
    rows = (folder / "train.jsonl").rename(folder / "train-00000-of-00003.jsonl").read_text()
    for count in (1, 2, 3):
        caplog.clear()
        (folder / f"train-0000{count - 1}-of-00003.jsonl").write_text(rows)
        assert len(open_rows(str(folder), "train")) == count
        assert (f"train-*: {count} of 3 files are there" in caplog.text) is (count < 3)


@pytest.mark.parametrize("text", ["---\nlicense: [a\n---\n", "---\nconfigs: 3\n---\n", b"---\nlicense: mit\n---\n\xe9"])
def test_a_readme_that_cannot_be_read_is_left_aside(text, messages_folder, caplog):
    folder = messages_folder([conversation_row()])
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert len(open_rows(str(folder), "train")) == 1
    assert "the metadata of README.md cannot be read" in caplog.text


@pytest.mark.parametrize("card", [True, False])
def test_a_folder_is_read_as_it_is_now_and_not_as_another_of_its_name(card, tmp_path):
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(folder, answer, time):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "train-00000-of-00001.parquet"
        pq.write_table(pa.table({"messages": [conversation_row("What?", answer, images=())["messages"]]}), file)
        os.utime(file, ns=(time, time))
        if card:
            files = "data_files:\n  - {split: train, path: train-00000-of-00001.parquet}"
            (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {files}\n---\n")

    def read(folder):
        rows = open_rows(str(folder), "train")
        return rows.conversation({"row": 0}).last_answer, rows.dataset._fingerprint

    one, other = tmp_path / "one/charts", tmp_path / "other/charts"
    write(one, "red", 10**18)
    write(other, "sky", 10**18)
    found = [read(one), read(other)]
    write(one, "tan", 2 * 10**18)
    found.append(read(one))
    assert [answer for answer, _ in found] == ["red", "sky", "tan"]
    assert len({fingerprint for _, fingerprint in found}) == 3
