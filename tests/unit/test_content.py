"""Images come in texts, parts and columns: each form is shown, or refused by its name; no name of a file is learned."""

import base64

import pytest

from fixtures.messages import RED, conversation_row, png, write_messages
from qwen_vl_sft.data.formats import FORMATS
from qwen_vl_sft.data.formats.content import check_question
from qwen_vl_sft.errors import MOST_QUOTED, BadRow

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
PICTURE = png()
BASE64 = base64.b64encode(PICTURE).decode()
URI = f"data:image/png;base64,{BASE64}"


def read(row, folder=None):
    (found,) = [name for name in ("messages", "conversations", "prompt_completion") if FORMATS[name].columns <= {*row}]
    return FORMATS[found].read(row, folder)


def kinds(conversation):
    return [[part.get("text", part["type"]) for part in message["content"]] for message in conversation.messages]


# What only refers to an image, and what names one of its own.
REFERENCES = [
    "<|image|>",
    "<|image_1|>",
    "<|img|>",
    "<image_1>",
    "<image 2>",
    "<image1>",
    "<Image>",
    "<image_placeholder>",
    "<ImageHere>",
    "<im_patch>",
    "<img>",
    "<img_1>",
    "<image/>",
    "<picture>",
    "<image: a bar chart>",
    "<image:charts/a.png>",
    "<charts/a.jpeg>",
    "[a.png]",
    "[IMG]",
    "[image 1]",
    "[Image: a bar chart]",
    "{{image}}",
    "{{ image_1 }}",
    "<start_of_image>",
    "<|vis_image|>",
    "<|media_begin|>",
    "\ncharts/a.PNG\n",
    "\nPicture 1: charts/a.jpg\n",
]
NAMED = [
    '<img src="a.png">',
    "<img class=x src=a.png/>",
    "a.png</image>",
    "<picture>a.png</picture>",
    "![chart](a.png)",
    "![](charts/a.png)",
    "![](a (1).png)",
    '![x](a.png "title")',
    "![x][ref]",
    "![[a.png]]",
    "[img]a.png[/img]",
    "<media>charts/a.png</media>",
    r"\includegraphics[width=3cm]{a}",
    ".. image:: a.png",
    f"Look: {URI}",
]


@pytest.mark.parametrize("form", [*REFERENCES, *NAMED])
@pytest.mark.parametrize("images", [{}, {"images": ["a.png"]}])
def test_an_image_named_in_an_unknown_form_is_refused(form, images, tmp_path):
    for row in (
        {"messages": [{"role": "user", "content": f"Look: {form}\nWhat?"}, TURNS[1]], **images},
        {"messages": [{"role": "system", "content": form}, *TURNS], **images},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": form}]}, TURNS[1]], **images},
        {"conversations": [{"from": "human", "value": form}, SAID[1]], **images},
        {"prompt": f"{form} What?", "completion": "red", **images},
    ):
        with pytest.raises(BadRow, match="names an image in its text") as error:
            read(row, tmp_path)
        assert len(str(error.value)) < 2 * MOST_QUOTED + 100
    with pytest.raises(BadRow, match="names an image in its text"):
        FORMATS["chartqa"].read({"image": PICTURE, "query": form, "label": "red"}, None)
    content = [{"type": "image"}, {"type": "text", "text": form}]
    shown = read({"messages": [{"role": "user", "content": content}, TURNS[1]], "images": ["a.png"]}, tmp_path)
    assert kinds(shown)[0] == ["image", form]


@pytest.mark.parametrize("form", REFERENCES)
def test_beside_placeholders_a_text_may_refer_to_its_images(form, tmp_path):
    assert kinds(read(conversation_row(f"In {form} <image>, what?"), tmp_path))[0] == [
        f"In {form} ",
        "image",
        ", what?",
    ]


# Text in rows without images, and with placeholders.
MARKS = [
    "{image}", "${image_1}", "< image >", "<image\u200b>", "\uff1cimage\uff1e", "&lt;image&gt;", "|IMAGE|", "<ImageContent>",
    "<fake_token_around_image>", "<im_start>",
]  # fmt: skip


@pytest.mark.parametrize("form", MARKS)
def test_what_marks_the_place_of_an_image_that_nothing_places_is_refused(form, tmp_path):
    row = {"messages": [{"role": "user", "content": f"Look: {form} What?"}, TURNS[1]]}
    with pytest.raises(BadRow, match="names an image in its text"):
        read({**row, "images": ["a.png"]}, tmp_path)
    with pytest.raises(BadRow, match="names an image in its text"):
        FORMATS["chartqa"].read({"image": PICTURE, "query": form, "label": "red"}, None)
    assert kinds(read(row, tmp_path))[0] == [f"Look: {form} What?"]
    assert kinds(read(conversation_row(f"{form} <image>"), tmp_path))[0] == [f"{form} ", "image"]


@pytest.mark.parametrize(
    "text", ["What is in b/c.png?", '{"file": "b/c.png"}', "file: b/c.png\nWhat?", "@b/c.png What?"]
)
def test_a_file_of_the_data_folder_that_a_text_names_is_shown_or_refused(text, tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/c.png"):
        (tmp_path / name).write_bytes(PICTURE)
    turns = [{"role": "user", "content": text}, TURNS[1]]
    for row in ({"messages": turns}, {"messages": turns, "images": ["a.png"]}, {"prompt": text, "completion": "red"}):
        with pytest.raises(BadRow, match="names an image in its text"):
            read(row, tmp_path)
    assert kinds(read({"messages": turns, "images": ["b/c.png"]}, tmp_path))[0] == ["image", text]
    assert kinds(read({"messages": turns}, tmp_path / "b"))[0] == [text]
    with pytest.raises(BadRow, match="names an image in its text"):
        FORMATS["chartqa"].read({"image": "a.png", "query": text, "label": "red"}, tmp_path)
    FORMATS["chartqa"].read({"image": "b/c.png", "query": text, "label": "red"}, tmp_path)


@pytest.mark.parametrize("form", NAMED)
def test_beside_placeholders_a_text_may_name_no_other_image(form, tmp_path):
    with pytest.raises(BadRow, match="names an image in its text"):
        read(conversation_row(f"In {form} <image>, what?"), tmp_path)


@pytest.mark.parametrize(
    "form", ["<|video|>", "<video_1>", '<video src="a.mp4">', "[audio]", "<|audio_1|>", "{{video}}"]
)
def test_other_media_named_in_a_text_are_refused(form):
    with pytest.raises(BadRow, match="names a video or a sound in its text"):
        read({"messages": [{"role": "user", "content": f"{form} What?"}, TURNS[1]]})


@pytest.mark.parametrize(
    "text",
    [
        "a < b > c",
        "see [1](a.html)",
        "[image quality](b) [imagine] [im]",
        "<imagine> !",
        "x = [i](0)",
        "a![b] and !(c)",
        "<im_start> <im> <imgs> <photos>",
        "Is the image in a.png? The file is called chart.png.",
        "{image} {{images}",
        r"\graphics{image}",
        "Image: a bar chart\nSave it as a.png .",
        "<b>bold</b> <code>x.py</code>",
        "<div> <a href='b'> <p.x>",
        "<vid> [video games] <audiobook>",
    ],
)
def test_other_texts_name_no_image(text):
    assert kinds(read({"messages": [{"role": "user", "content": text}, TURNS[1]]}))[0] == [text]


def test_a_placeholder_in_a_question_of_a_video_is_told_apart():
    with pytest.raises(BadRow, match="has <video> in a question"):
        check_question("<video>?")


def test_images_named_as_qwen_vl_does_are_shown(tmp_path):
    text = "Picture 1: <img>a.png</img>\nPicture 2: <img>b/c.png</img>\nWhich?"
    conversation = read({"conversations": [{"from": "user", "value": text}, SAID[1]]}, tmp_path)
    assert kinds(conversation)[0] == ["Picture 1: ", "image", "\nPicture 2: ", "image", "\nWhich?"]
    assert [file.path for file in conversation.media] == [str(tmp_path / "a.png"), str(tmp_path / "b/c.png")]
    with pytest.raises(BadRow, match=r"has 0 image placeholder\(s\) in its messages but 1 image"):
        read({"conversations": [{"from": "user", "value": text}, SAID[1]], "image": "a.png"}, tmp_path)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
        {"type": "image_url", "image_url": URI},
        {"type": "input_image", "image_url": URI},
        {"type": "image", "image": URI},
        {"type": "image", "image": {"bytes": PICTURE, "path": None}},
        {"type": "image", "base64": BASE64},
        {"type": "image", "path": RED},
        {"type": "image", "image": f"file://{RED}", "text": None},
        {"type": "image_url", "image_url": {"url": RED}},
        {"image": RED},
        {"type": None, "image": RED, "text": None, "image_url": None},
    ],
)
def test_parts_may_bring_their_image(part, tmp_path):
    folder = write_messages(tmp_path, [])
    question = {"role": "user", "content": [part, {"type": "input_text", "text": "What?"}]}
    conversation = read({"messages": [question, TURNS[1]]}, folder)
    assert kinds(conversation)[0] == ["image", "What?"]
    assert conversation.media[0].decode().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "image", "image": "a.png", "path": "b.png"}, "brings its own image and path; keep one"),
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "URLs are not read"),
        ({"type": "image", "source": {"data": BASE64}}, "brings its own source, which is not read"),
        ({"type": "image", "image": "a.png", "resized_height": 280}, "brings its own resized_height"),
        ({"type": "image", "image": "a.png", "text": "Look"}, "type 'image' with a text; write the text as a part"),
        ({"type": "text", "text": "Look", "image": "a.png"}, "brings its own image, which is not read"),
        ({"image": "a.png", "text": "Look"}, "a content part of type None"),
        ({"type": "file", "file": "a.png"}, "a content part of type 'file'"),
        ({"type": "x" * 999}, "a content part of type 'xxx.*1,001 characters"),
    ],
)
def test_parts_that_are_not_read_are_told_by_name(part, told):
    with pytest.raises(BadRow, match=told):
        read({"messages": [{"role": "user", "content": [part]}, TURNS[1]]})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("https://example.org/a.png", "by its URL, https://example.org/a.png, and URLs are not read"),
        ("s3://bucket/a.png", "by its URL"),
        ("data:image/png;base64,***", "data URI that is no base64"),
        ("data:image/svg+xml,<svg/>", "data URI without base64"),
        ("../" + 10 * f"{50 * 'x'}/", "lies outside the data folder"),
        (BASE64[: len(BASE64) // 4 * 4 - 3] + 300 * "A", "neither a path nor whole base64"),
        (300 * "_9j_", "neither a path nor whole base64"),
        (["a.png"], "neither its bytes nor the name of a file, but .'a.png'.; write a path"),
        ({"image": "a.png"}, "neither its bytes nor the name of a file, but {'image': 'a.png'}"),
        (999 * [0], "neither its bytes nor the name of a file"),
        ({"path": None, "bytes": None}, "has a missing image"),
        ("https://example.org/" + 999 * "x", "by its URL"),
    ],
)
def test_images_that_are_not_read_are_told_in_short(value, told, tmp_path):
    with pytest.raises(BadRow, match=told) as error:
        read({"messages": TURNS, "images": [value]}, tmp_path)
    assert len(str(error.value)) < 500


def test_a_long_name_of_no_file_is_told_in_short(tmp_path):
    with pytest.raises(BadRow, match=r"does not exist|cannot be read") as error:
        read({"messages": TURNS, "images": [50 * "folder/" + "a.png"]}, tmp_path).media[0].open()
    assert len(str(error.value)) < 500


def test_a_reason_of_the_system_does_not_repeat_the_path(tmp_path):
    with pytest.raises(BadRow, match=r"cannot be read \(File name too long\)$") as error:
        read({"messages": TURNS, "images": [999 * "x" + ".png"]}, tmp_path).media[0].open()
    assert len(str(error.value)) < MOST_QUOTED + 100


LINES = "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76))


@pytest.mark.parametrize("value", [BASE64, URI, f"DATA:Image/PNG;BASE64,{BASE64}", LINES])
def test_image_columns_may_hold_base64(value):
    for row in ({"messages": TURNS, "images": [value]}, {"messages": TURNS, "image": value}):
        assert read(row).media[0].data == PICTURE
    chart = FORMATS["chartqa"].read({"image": value, "query": "What?", "label": "red"}, None)
    assert chart.media[0].data == PICTURE


@pytest.mark.parametrize(
    "images",
    [
        {"images": ["a.png", "b.png"]},
        {"image": ["a.png", "b.png"]},
        {"images": [{"path": "a.png"}, {"bytes": None, "path": "b.png"}]},
    ],
)
def test_images_without_placeholders_come_before_the_first_question_in_order(images, tmp_path):
    later = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "blue"}]
    system = {"role": "system", "content": "Be brief."}
    conversation = read({"messages": [system, *TURNS, *later], **images}, tmp_path)
    assert kinds(conversation) == [["Be brief."], ["image", "image", "What?"], ["red"], ["And?"], ["blue"]]
    assert [file.path for file in conversation.media] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


@pytest.mark.parametrize("text", ["<image>", "<video>", "<audio> or <image>", "![x](a.png)"])
def test_a_placeholder_is_text_where_parts_or_an_answer_leave_no_doubt(text, tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    for said in (answer, {"role": "assistant", "content": text}):
        row = {"messages": [{"role": "user", "content": content}, said], "images": ["a.png"]}
        assert kinds(read(row, tmp_path)) == [["image", text], [text]]
    assert kinds(read(conversation_row("<image>What?", text), tmp_path)) == [["image", "What?"], [text]]
    brought = [{"type": "image", "image": "a.png"}, {"type": "text", "text": text}]
    assert kinds(read({"messages": [{"role": "user", "content": brought}, TURNS[1]]}, tmp_path)) == [
        ["image", text],
        ["red"],
    ]
