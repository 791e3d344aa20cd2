"""Boxes and points: read from columns and texts, learned in the model's coordinates, and brought back from its answers."""

import io
import json
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fixtures.messages import conversation_row, png
from qwen_vl_sft.data.boxes import answer_in_data_coordinates, place_boxes, read_boxes, regions_in_answer
from qwen_vl_sft.data.conversation import Conversation, text_of
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats import FORMATS
from qwen_vl_sft.data.media.image import resized_size
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.data.preview import shown
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.families import qwen2_5_vl, qwen2_vl, qwen3_vl
from qwen_vl_sft.training.plan import boxes_lines


@dataclass(frozen=True)
class SizedImage(ImageFile):
    """An image of which only the size is known."""

    size: tuple[int, int]

    @property
    def upright_size(self):
        return self.size


QWEN2, QWEN25, QWEN3 = (module.FAMILY.chat for module in (qwen2_vl, qwen2_5_vl, qwen3_vl))
# The tiny processor makes 56 x 140 pixels of them.
SIZE = (98, 200)
OBJECTS = {"ref": ["the bar"], "bbox": [[10, 20, 49, 100]]}


def row(answer="<ref-object>: <bbox>", question="<image>Find it.", objects=OBJECTS, images=("a.png",)):
    return {**conversation_row(question, answer, images), "objects": objects}


@pytest.fixture
def folder(tmp_path):
    """A folder with two images of different sizes."""
    (tmp_path / "a.png").write_bytes(png("red", SIZE))
    (tmp_path / "b.png").write_bytes(png("blue", (56, 28)))
    return tmp_path


def read(raw, folder, coordinates=None):
    (folder / "train.jsonl").write_text(json.dumps(raw) + "\n")
    rows = open_rows(str(folder), "train", box_coordinates=coordinates)
    return rows.conversation({"row": 0})


def learned(raw, folder, processor, chat=QWEN2, coordinates=None):
    """The text of the last answer as the model learns it."""
    placed = place_boxes(read(raw, folder, coordinates), chat.boxes, processor)
    assert [part["type"] for message in placed.messages for part in message["content"]].count("text") == len(
        placed.messages
    )
    return text_of(placed.messages[-1])


@pytest.mark.parametrize(
    ("chat", "box", "named"),
    [
        # 10 / 98, 20 / 200, 49 / 98 and 100 / 200 in thousandths
        (QWEN2, "<|box_start|>(102,100),(500,500)<|box_end|>", "<|object_ref_start|>the bar<|object_ref_end|>"),
        # of 56 x 140 pixels
        (QWEN25, "[6, 14, 28, 70]", "the bar"),
        (QWEN3, "[102, 100, 500, 500]", "the bar"),
    ],
)
def test_objects_are_written_as_the_family_does(chat, box, named, folder, tiny_processor):
    assert resized_size(ImageFile(None, str(folder / "a.png")), tiny_processor) == (56, 140)
    assert learned(row(), folder, tiny_processor, chat) == f"{named}: {box}"
    asked = row("yes", "<image>Is <ref-object> at <bbox>?")
    placed = place_boxes(read(asked, folder), chat.boxes, tiny_processor)
    assert text_of(placed.messages[0]) == f"Is {named} at {box}?"


@pytest.mark.parametrize(
    ("coordinates", "stated", "numbers"),
    [
        (None, None, [10, 20, 49, 100]),
        (None, "real", [10, 20, 49, 100]),
        ("pixels", None, [10, 20, 49, 100]),
        ("norm1", None, [10 / 98, 0.1, 0.5, 0.5]),
        ("norm1000", None, [102, 100, 500, 500]),
        # The row tells it by itself.
        ("pixels", "norm1", [10 / 98, 0.1, 0.5, 0.5]),
        ("norm1", "norm1000", [102, 100, 500, 500]),
        ("norm1000", "real", [10, 20, 49, 100]),
    ],
)
def test_the_recipe_or_the_row_tells_the_coordinates(coordinates, stated, numbers, folder, tiny_processor):
    objects = {"ref": [], "bbox": [numbers], **({"bbox_type": stated} if stated else {})}
    for chat, wanted in ((QWEN25, "[6, 14, 28, 70]"), (QWEN3, "[102, 100, 500, 500]")):
        assert learned(row("<bbox>", objects=objects), folder, tiny_processor, chat, coordinates) == wanted


@pytest.mark.parametrize("coordinates", ["pixels", "norm1", "norm1000", None])
@pytest.mark.parametrize(
    "form",
    [
        "<|object_ref_start|>bar<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|> it is",
        '```json\n[{{"bbox_2d": [{}, {}, {}, {}], "label": "bar 1"}}]\n```',
    ],
)
def test_boxes_in_texts_keep_their_form(form, coordinates, folder, tiny_processor):
    numbers = {"norm1": (0.5, 0.1, 1, 1), "norm1000": (500, 100, 1000, 1000)}.get(coordinates, (49, 20, 98, 200))
    raw = conversation_row("<image>Where?", form.format(*numbers), ("a.png",))
    wanted = numbers if coordinates is None else (28, 14, 56, 140)
    assert learned(raw, folder, tiny_processor, QWEN25, coordinates) == form.format(*wanted)
    wanted = numbers if coordinates is None else (500, 100, 1000, 1000)
    assert learned(raw, folder, tiny_processor, QWEN2, coordinates) == form.format(*wanted)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("<|box_start|>(49,20)<|box_end|>", "<|box_start|>(500,100)<|box_end|>"),
        ('{"point_2d": [49, 20]}', '{"point_2d": [500, 100]}'),
        (
            '<points x1="49" y1="20" x2="98" y2="0" alt="bar 7">bar 7</points>',
            '<points x1="500" y1="100" x2="1000" y2="0" alt="bar 7">bar 7</points>',
        ),
        ('<point x="49.0" y="20.0">', '<point x="500" y="100">'),
        ("<|box_start|>(49, 20), (98, 200)<|box_end|>", "<|box_start|>(500, 100), (1000, 1000)<|box_end|>"),
        # Not a form of a box: other texts stay what they are.
        ('<rect x="49" y="20"> and [1, 2, 3, 4] and (5,6)', '<rect x="49" y="20"> and [1, 2, 3, 4] and (5,6)'),
    ],
)
def test_points_and_tags(written, wanted, folder, tiny_processor):
    raw = conversation_row("<image>Where?", written, ("a.png",))
    assert learned(raw, folder, tiny_processor, QWEN3, "pixels") == wanted


# Boxes as other models and trainers write them.
OTHER_FORMS = [
    "<ref>the bar</ref><box>(10,20),(49,100)</box>",
    "<box>[[10, 20, 49, 100]]</box>",
    "<bbox>10, 20, 49, 100</bbox>",
    "<point>10 20</point>",
    "<loc_10><loc_20><loc_49><loc_100>",
    "{<10><20><49><100>}",
    '{"bbox": [10, 20, 49, 100]}',
    '{"box_2d": [20, 10, 100, 49]}',
    '{"bbox_2d": [[10, 20, 49, 100], [1, 2, 3, 4]]}',
    "{'coordinates': (10, 20)}",
    "click(start_box='(10,20)')",
    "pyautogui.click(x=10, y=20)",
    "x1=10, y1=20, x2=49, y2=100",
    '{"xmin": 10, "ymin": 20, "xmax": 49, "ymax": 100}',
    "[10, 20, 49, 100]",
    "[[10, 20, 49, 100], [1, 2, 3, 4]]",
    " (10,20),(49,100)\n",
]


@pytest.mark.parametrize("written", OTHER_FORMS)
def test_boxes_in_other_forms_are_not_left_unconverted(written, folder, tiny_processor):
    raw = conversation_row("<image>Find it.", written, ("a.png",))
    for coordinates in ("pixels", "norm1000"):
        with pytest.raises(BadRow, match="which box_coordinates does not convert; write <bbox>"):
            read(raw, folder, coordinates)
    assert learned(raw, folder, tiny_processor) == written
    assert text_of(read(conversation_row("Find it.", written, ()), folder, "pixels").messages[-1]) == written
    beside = f'{{"bbox_2d": [10, 20, 49, 100]}} {written}'
    if "(" in written.strip()[:1] or written.startswith("["):
        return  # numbers alone are a box only as a whole answer
    with pytest.raises(BadRow, match="which box_coordinates does not convert"):
        read(conversation_row("<image>Find it.", beside, ("a.png",)), folder, "pixels")


@pytest.mark.parametrize(
    "text",
    ["x = 4, y = 2", "The bar [1, 2, 3, 4] of (1, 2)", '{"x": 1, "y": 2}', "f(1, 2)", "[23, 18]", "box: 4", "10, 20"],
)
def test_other_numbers_beside_boxes_stay_as_they_are(text, folder, tiny_processor):
    assert (
        learned(conversation_row("<image>Find it.", text, ("a.png",)), folder, tiny_processor, coordinates="pixels")
        == text
    )


@pytest.mark.parametrize("coordinates", ["pixels", "norm1000", None])
def test_parts_of_sides_are_no_pixels(coordinates, folder, tiny_processor):
    raw = row("<bbox>", objects={"bbox": [[0.1, 0.1, 0.5, 1]]})
    with pytest.raises(BadRow, match=r"no larger than a (pixel|thousandth); .* set box_coordinates: norm1"):
        learned(raw, folder, tiny_processor, coordinates=coordinates)
    assert learned(raw, folder, tiny_processor, coordinates="norm1")


def test_two_numbers_are_a_point(folder, tiny_processor):
    raw = row("click(start_box='<bbox>')", objects={"ref": [], "bbox": [[49, 20]]})
    assert learned(raw, folder, tiny_processor) == "click(start_box='<|box_start|>(500,100)<|box_end|>')"
    assert learned(raw, folder, tiny_processor, QWEN25) == "click(start_box='[28, 14]')"


def test_each_box_is_on_its_image(folder, tiny_processor):
    objects = {"ref": [], "bbox": [[49, 20, 98, 200], [28, 0, 56, 28]], "image_id": [0, 1]}
    raw = row("<bbox> and <bbox>", "<image><image>Where?", objects, ("a.png", "b.png"))
    # The second image has 56 x 28 pixels, and is enlarged.
    assert learned(raw, folder, tiny_processor, QWEN25) == "[28, 14, 56, 140] and [42, 0, 84, 56]"
    assert learned(raw, folder, tiny_processor, QWEN3) == "[500, 100, 1000, 1000] and [500, 0, 1000, 1000]"
    del raw["objects"]["image_id"]
    assert learned(raw, folder, tiny_processor, QWEN3).endswith("[286, 0, 571, 140]")


def test_a_box_in_a_text_beside_images_of_several_sizes_is_refused_where_that_matters(folder, tiny_processor):
    raw = conversation_row("<image><image>?", '{"bbox_2d": [500, 0, 1000, 500]}', ("a.png", "b.png"))
    assert learned(raw, folder, tiny_processor, QWEN3, "norm1000") == '{"bbox_2d": [500, 0, 1000, 500]}'
    with pytest.raises(BadRow, match="images of several sizes, so that it is not known on which it is; write <bbox>"):
        learned(raw, folder, tiny_processor, QWEN25, "norm1000")
    raw["images"] = ["a.png", "a.png"]
    assert learned(raw, folder, tiny_processor, QWEN25, "norm1000") == '{"bbox_2d": [28, 0, 56, 70]}'


def test_boxes_are_on_the_upright_image(folder, tiny_processor):
    image, exif = Image.new("RGB", (200, 98), "red"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(folder / "a.png", exif=exif)
    assert learned(row("<bbox>", objects={"bbox": [[49, 20, 98, 200]]}), folder, tiny_processor, QWEN25) == (
        "[28, 14, 56, 140]"
    )
    image.save(folder / "turned.jpg", exif=exif)
    assert ImageFile(None, str(folder / "turned.jpg")).upright_size == (98, 200)


def test_the_resized_size_is_that_of_the_patches(tiny_processor):
    choose = random.Random(0)
    for _ in range(30):
        size = choose.randint(28, 400), choose.randint(28, 400)
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "JPEG")
        file = ImageFile(buffer.getvalue(), None)
        _, height, width = (Encoder(tiny_processor).read_media(file).grid * 14).tolist()
        assert resized_size(file, tiny_processor) == (width, height)


BAD = {
    "has the box [10, 20, 99, 100], which is not inside its image of 98 x 200 (pixels)": {"bbox": [[10, 20, 99, 100]]},
    "has the box [-1, 20, 9, 100], which is not inside": {"bbox": [[-1, 20, 9, 100]]},
    "has the point [10, 201], which is not inside": {"bbox": [[10, 201]]},
    "has the box [0.1, 0.1, 0.2, 1.1], which is not inside its image of 1 x 1 (norm1)": {
        "bbox": [[0.1, 0.1, 0.2, 1.1]],
        "bbox_type": "norm1",
    },
    "has the box [20, 20, 10, 100], which is empty: it must be x1, y1, x2, y2": {"bbox": [[20, 20, 10, 100]]},
    "has the box [10, 20, 30, 20], which is empty": {"bbox": [[10, 20, 30, 20]]},
    "has a box of 3 numbers in its objects": {"bbox": [[1, 2, 3]]},
    "has a box in its objects that is not a list of numbers: [1, 2, None, 4]": {"bbox": [[1, 2, None, 4]]},
    "has objects of bbox_type 'xywh'; known are real, pixels, norm1, norm1000": {
        "bbox": [[1, 2, 3, 4]],
        "bbox_type": "xywh",
    },
    "has a box on image_id 1, and it has 1 image(s)": {"bbox": [[1, 2, 3, 4]], "image_id": [1]},
    "has 1 boxes in its objects but 2 image_id": {"bbox": [[1, 2, 3, 4]], "image_id": [0, 0]},
    "has 1 <bbox> in its messages but 2 in bbox of its objects": {"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]]},
    "has 1 <bbox> in its messages but 0 in bbox of its objects": {"ref": [], "bbox": []},
    "has 0 <ref-object> in its messages but 1 in ref of its objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]},
    "has a name in ref of its objects that is no text: ''": {"ref": [""], "bbox": [[1, 2, 3, 4]]},
    "has category, area in its objects, and only ref, bbox, bbox_type, image_id are read; boxes are": {
        "bbox": [[1, 2, 3, 4]],
        "category": [3],
        "area": [12.0],
    },
    'has objects in another form than {"ref": [names], "bbox"': [{"ref": "a", "bbox": [1, 2, 3, 4]}],
}


@pytest.mark.parametrize("problem", BAD)
def test_objects_that_cannot_be_are_bad_rows(problem, folder, tiny_processor):
    with pytest.raises(BadRow) as error:
        learned(row("<bbox>", objects=BAD[problem]), folder, tiny_processor, QWEN25)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("<|box_start|>(1,2),(3)<|box_end|>", "between these tokens stands (x1,y1),(x2,y2), or (x,y)"),
        ('{"bbox_2d": [1, 2, 3]}', "bbox_2d has 4 numbers, point_2d has 2"),
        ('{"bbox_2d": [90, 20, 10, 100]}', "has the box [90, 20, 10, 100], which is empty"),
        ("<|quad_start|>(1,2),(3,4),(5,6),(7,8)<|quad_end|>", "has a quadrangle"),
    ],
)
def test_damaged_boxes_in_texts_are_bad_rows(written, problem, folder, tiny_processor):
    with pytest.raises(BadRow) as error:
        learned(conversation_row("<image>?", written, ("a.png",)), folder, tiny_processor, QWEN2, "pixels")
    assert problem in str(error.value)


def test_bad_rows_are_named_and_can_be_skipped(folder, tiny_processor):
    good, bad = row("<bbox>", objects={"bbox": [[1, 2, 3, 4]]}), row("<bbox>", objects={"bbox": [[1, 2, 3, 400]]})
    (folder / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (good, bad, good)))
    rows, encoder = open_rows(str(folder), "train"), Encoder(tiny_processor)
    with pytest.raises(UserError, match=r"row 1 has the box \[1, 2, 3, 400\], which is not inside its image"):
        scan(rows, encoder)
    found = scan(rows, encoder, skip_bad_rows=True)
    assert (found.kept.tolist(), len(found.bad)) == ([0, 2], 1)


@pytest.mark.parametrize(("chat", "text"), [(QWEN2, "(500,100),(1000,1000)"), (QWEN25, "[28, 14, 56, 140]")])
def test_what_is_measured_shown_and_learned_is_the_same(chat, text, folder, tiny_processor):
    conversation, encoder = (
        read(row("<bbox>", objects={"bbox": [[49, 20, 98, 200]]}), folder),
        Encoder(tiny_processor, chat=chat),
    )
    encoded, measured = encoder.encode(conversation), encoder.measure(conversation)
    assert (measured.tokens, measured.target_tokens) == (len(encoded.input_ids), encoded.target_tokens)
    assert text in shown(encoded, encoder)


def test_the_plan_tells_what_is_learned():
    assert boxes_lines("pixels", QWEN25.boxes) == [
        "boxes       pixels of the original image, learned as pixels of the resized image"
    ]
    assert boxes_lines("norm1", QWEN3.boxes) == ["boxes       0 to 1, learned as 0 to 1000"]
    assert boxes_lines(None, QWEN2.boxes) == []


def test_the_scan_is_not_that_of_other_coordinates(folder, tiny_processor):
    raw = conversation_row("<image>Find it.", '{"bbox_2d": [0, 0, 1, 1]}', ("a.png",))
    (folder / "train.jsonl").write_text(json.dumps(raw) + "\n")
    found = [
        scan(open_rows(str(folder), "train", box_coordinates=coordinates), Encoder(tiny_processor, chat=chat))
        for coordinates in (None, "norm1")
        for chat in (QWEN25, QWEN3)
    ]
    as_written, again, resized, thousandths = (int(each.lengths.tokens[0]) for each in found)
    assert as_written == again < resized < thousandths


ANSWERS = {
    # Of the model, on the image of 98 x 200 pixels, which it sees as 56 x 140; in the data's pixels.
    "qwen2": (QWEN2, "<|box_start|>(500,100),(1000,1000)<|box_end|>", "[49, 20, 98, 200]"),
    "qwen2, no tokens": (QWEN2, "It is (500, 100), (1000, 1000).", "It is [49, 20, 98, 200]."),
    "qwen2.5": (
        QWEN25,
        '[{"bbox_2d": [28, 14, 56, 140], "label": "bar 1"}]',
        '[{"bbox_2d": [49, 20, 98, 200], "label": "bar 1"}]',
    ),
    "qwen3": (QWEN3, "[500, 100, 1000, 1000] or [0, 0, 10, 10]", "[49, 20, 98, 200] or [0, 0, 1, 2]"),
    "a point": (QWEN3, "(500,100)", "[49, 20]"),
    "a name": (QWEN2, "<|object_ref_start|>a<|object_ref_end|><|box_start|>(0,0),(1,1)<|box_end|>", "a[0, 0, 0, 0]"),
    "no box": (QWEN3, "I cannot see 12 bars.", "I cannot see 12 bars."),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_come_back_in_the_datas_coordinates(name, folder, tiny_processor):
    chat, answer, wanted = ANSWERS[name]
    target = read(row(), folder)
    assert answer_in_data_coordinates(answer, target, chat.boxes, tiny_processor) == wanted


def test_answers_keep_the_form_of_texts(folder, tiny_processor):
    answer = "<|box_start|>(500,100),(1000,1000)<|box_end|>"
    written = "<|box_start|>(0.1,0.1),(0.2,0.2)<|box_end|>"
    target = read(conversation_row("<image>?", written, ("a.png",)), folder, "norm1")
    found = answer_in_data_coordinates(answer, target, QWEN2.boxes, tiny_processor)
    assert found == "<|box_start|>(0.5,0.1),(1,1)<|box_end|>"
    # Nothing is known of the answer where the right one has no box.
    target = read(conversation_row("<image>?", "red", ("a.png",)), folder, "norm1")
    assert answer_in_data_coordinates(answer, target, QWEN2.boxes, tiny_processor) == answer


@st.composite
def boxes_on_images(draw):
    width, height = draw(st.integers(28, 3000)), draw(st.integers(28, 3000))
    if max(width, height) > 190 * min(width, height):
        height = width
    x1, y1 = draw(st.integers(0, width - 10)), draw(st.integers(0, height - 10))
    return (width, height), [x1, y1, draw(st.integers(x1 + 5, width)), draw(st.integers(y1 + 5, height))]


@given(boxes_on_images(), st.sampled_from([QWEN2, QWEN25, QWEN3]), st.sampled_from(["pixels", "norm1", "norm1000"]))
def test_there_and_back_is_the_same_box(tiny_processor, drawn, chat, coordinates):
    (width, height), box = drawn
    file = SizedImage(None, None, (width, height))
    scale = {"pixels": (1, 1), "norm1": (width, height), "norm1000": (width / 1000, height / 1000)}[coordinates]
    numbers = [number / scale[place % 2] for place, number in enumerate(box)]
    objects = {"bbox": [numbers], "bbox_type": coordinates}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<bbox>"}]
    parsed = FORMATS["messages"].parse({"messages": turns}, None)
    target = read_boxes(Conversation(parsed.messages, [file]), objects, None)
    answer = text_of(place_boxes(target, chat.boxes, tiny_processor).messages[-1])
    (back,) = regions_in_answer(answer_in_data_coordinates(answer, target, chat.boxes, tiny_processor))
    # A step of the model is a thousandth of the side, or a pixel of the resized image, which has a side of 28 at least.
    step = 1 / 1000 if chat.boxes.coordinates == "norm1000" else 1 / 28
    for place, (found, wanted) in enumerate(zip(back.numbers, numbers, strict=True)):
        side = (width, height)[place % 2] / scale[place % 2]
        assert abs(found - wanted) <= side * step / 2 + (1 if coordinates != "norm1" else 1e-3)


@pytest.mark.parametrize("objects", [None, {"ref": None, "bbox": None}, {}])
@pytest.mark.parametrize(
    ("answer", "question"), [("<bbox>", "<image>Find it."), ("It is.", "<image>Find <ref-object>.")]
)
def test_a_slot_without_objects_is_not_learned_as_text(objects, answer, question, folder):
    with pytest.raises(BadRow, match=r"has 1 <|has <(bbox|ref-object)> in its messages and nothing in column objects"):
        read(row(answer, question, objects), folder)


def test_a_tag_around_a_box_is_text(folder):
    raw = conversation_row("<image>Find it.", "<bbox>1, 2, 3, 4</bbox>", ["a.png"])
    assert read(raw, folder).last_answer == "<bbox>1, 2, 3, 4</bbox>"
