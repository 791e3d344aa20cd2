"""What scripts/preview.py finds in data with faults and without, and its page in a real browser."""

import json
import re
import shutil

import pytest
from PIL import Image

from fixtures.messages import conversation_row, png
from fixtures.processes import run_process
from fixtures.repository import REPOSITORY
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.previewing.examples import read_examples
from qwen_vl_sft.previewing.inspection import inspect
from qwen_vl_sft.previewing.page import render, write_page
from qwen_vl_sft.previewing.terminal import as_json, describe

COLORS = ("red", "green", "blue", "black", "white", "yellow", "orange", "purple", "grey", "pink", "brown", "navy")
HOSTILE = "</span><script>window.hacked = 1</script><svg onload='window.hacked = 1'> {{facts}}"


def rows_of(colors):
    return [conversation_row(f"<image>Is it {color}?", f"It is {color}", [f"images/{color}.png"]) for color in colors]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A folder of a row for each image: nine to train on and three to evaluate on."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / "images").mkdir()
    for place, color in enumerate(COLORS):
        (folder / f"images/{color}.png").write_bytes(png(color, (56 + 28 * (place % 3), 84)))
    write(folder, "train", rows_of(COLORS[:9]))
    write(folder, "val", rows_of(COLORS[9:]))
    return folder


def write(folder, split, rows):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def planted(clean, tmp_path_factory):
    """The same with faults, each in a row of its own."""
    folder = tmp_path_factory.mktemp("planted") / "data"
    shutil.copytree(clean, folder)
    train, evaluation = rows_of(COLORS[:9]), rows_of(COLORS[9:])
    damaged = png("red", (300, 300))
    (folder / "images/damaged.png").write_bytes(damaged[: len(damaged) // 2])
    Image.new("1", (12_000, 9_000)).save(folder / "images/huge.png")
    Image.new("1", (1_500, 1_500)).save(folder / "images/large.png")
    train[0]["images"] = ["images/damaged.png"]
    train[1]["messages"][1]["content"] = ""
    train[2]["images"] = ["images/huge.png"]
    train[3]["messages"][0]["content"] = "<image><image>Is it black?"
    train[4]["images"] = ["images/large.png"]
    train.append({**train[5], "messages": [train[5]["messages"][0], {"role": "assistant", "content": "no"}]})
    shutil.copy(folder / "images/orange.png", folder / "images/another_name.png")
    evaluation.append({**train[6], "images": ["images/another_name.png"]})
    evaluation.append(conversation_row("<image>Is it purple or brown?", "purple", ["images/purple.png"]))
    write(folder, "train", train)
    write(folder, "val", evaluation)
    return folder


def recipe_of(folder, **keys):
    words = {"dataset_name": str(folder), "dataset_format": "messages", "output_dir": str(folder / "run")}
    return read_recipe(REPOSITORY / "recipes/quickstart.yaml", {**words, **keys})


@pytest.fixture(scope="module")
def found(planted):
    return inspect(recipe_of(planted))


def test_data_without_a_fault_have_none(clean):
    found = inspect(recipe_of(clean))
    assert (found.problems, found.notes) == ((), ())
    assert [summary.usable for summary in found.summaries] == [9, 3]
    assert (found.overlap.rows, found.overlap.shown) == (0, 0)
    assert "nothing in the data would make training fail" in describe(found)
    # The costs are those of the rows as they are encoded.
    rows = found.splits[0].rows
    lengths = [len(rows.encode({"row": place}, found.encoder).input_ids) for place in range(9)]
    assert found.summaries[0].tokens.total == sum(lengths) == next(limit.tokens for limit in found.limits if limit.now)
    assert found.summaries[0].image_tokens.total + found.summaries[0].text_tokens.total == sum(lengths)


def test_each_planted_fault_is_found_and_nothing_else(found):
    problems = {(finding.split, finding.rows) for finding in found.problems}
    assert {finding.text for finding in found.problems} == {"1 of 10 rows cannot be used"}
    assert {re.sub(r" \(.*\)$", "", row) for _, (row,) in problems} == {
        "row 0 image images/damaged.png cannot be decoded",
        "row 1 has an empty answer",
        "row 2 image images/huge.png of 12000x9000 pixels is refused: above 89,478,485",
        "row 3 has 2 image placeholder(s) in its messages but 1 image(s); write <image> where each is shown",
    }
    assert {(finding.split, finding.text, finding.rows) for finding in found.notes} == {
        (
            "train",
            "1 of 5 images reduced to less than half of width and height: small text may be lost",
            ("row 4: 1500 x 1500 pixels, 112 x 112 pixels for the model",),
        ),
        (
            "train",
            "1 of 6 rows: an earlier row asks the same of the same images; questions with several answers: 1",
            ("row 9 asks what row 5 asks, and answers otherwise",),
        ),
        (
            "evaluation",
            "1 of 5 rows also in training: the same question on the same images",
            ("row 3 asks what training row 6 asks",),
        ),
        ("evaluation", "1 of 5 rows: other questions on images of training rows", ()),
    }


def test_rows_that_are_left_out_do_not_make_training_fail(planted):
    found = inspect(recipe_of(planted, bad_rows="skip"))
    assert found.problems == ()
    assert sum(finding.text == "1 of 10 rows cannot be used" for finding in found.notes) == 4
    longest = found.summaries[0].tokens.most
    short = inspect(recipe_of(planted, bad_rows="skip", max_length=longest - 1))
    (problem,) = short.problems
    assert problem.text.endswith(f"of 10 rows above max_length {longest - 1:,}")
    assert f"has {longest:,} tokens" in problem.rows[0]
    # Too long rows count among those that pixel limits are tried on.
    assert short.summaries[0].tokens == found.summaries[0].tokens
    assert next(limit.too_long for limit in short.limits if limit.now) == short.summaries[0].too_long > 0
    dropped = inspect(recipe_of(planted, bad_rows="skip", max_length=longest - 1, overlong="drop"))
    assert dropped.problems == ()
    packed = inspect(recipe_of(planted, bad_rows="skip", packing=True, tokens_per_batch=longest - 1))
    assert [problem.text[:16] for problem in packed.problems] == ["tokens_per_batch"]


def test_the_text_has_80_columns_and_colors_on_request(found):
    plain, colored = describe(found), describe(found, colored=True)
    assert max(map(len, plain.splitlines())) <= 80
    assert "\x1b" not in plain
    without = re.sub("\x1b\\[\\d*m", "", colored)
    assert max(map(len, without.splitlines())) <= 80
    assert without.split("\na row")[0] == plain.split("\na row")[0]
    assert "\x1b[32mIt is orange" in colored or "\x1b[32mIt is" in colored
    assert "{{It is" in plain
    assert json.loads(json.dumps(as_json(found)))["would_fail"] is True


def test_the_script_ends_with_1_and_leaves_the_run_folder_alone(planted, tmp_path):
    words = ["--recipe", "recipes/quickstart.yaml", "--dataset_name", planted, "--dataset_format", "messages"]
    run, page = tmp_path / "run", tmp_path / "page.html"
    run.mkdir()
    (run / "recipe.yaml").write_text("mine")
    told = run_process("scripts/preview.py", *words, "--output_dir", run, "--page", page, "--json")
    assert told.returncode == 1, told.stderr
    assert len(json.loads(told.stdout)["problems"]) == 4
    assert [path.name for path in run.iterdir()] == ["recipe.yaml"]
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir() if path != run] == ["page.html"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset_train_split": "nowhere"}, "nowhere"),
        ({"dataset_streaming": True}, "dataset_streaming: say how much of the stream to read"),
        ({"max_train_samples": 0}, "max_train_samples: 0 must be at least 1"),
        ({"dataset_test_split": None}, "eval_strategy is set but dataset_test_split is not"),
    ],
)
def test_what_cannot_be_opened_is_said(clean, keys, message):
    with pytest.raises(ValueError, match=message):
        inspect(recipe_of(clean, **keys))


def test_the_beginning_of_a_stream_is_read(clean):
    found = inspect(recipe_of(clean, dataset_streaming=True, max_train_samples=4, max_eval_samples=2))
    assert [summary.rows for summary in found.summaries] == [4, 2]
    assert found.problems == ()


# In a browser


def boxed_rows():
    objects = {"ref": ["the bar"], "bbox": [[25, 50, 75, 100]], "bbox_type": "real"}
    turns = [{"role": "user", "content": f"<image>Where is <ref-object>? {HOSTILE}"}, {"role": "assistant"}]
    turns[1]["content"] = "<bbox>"
    return [{"messages": turns, "images": ["images/page.png"], "objects": objects}]


@pytest.fixture
def page(browser, tmp_path):
    """A page of rows with boxes, hostile texts and tokens of a hundred lengths."""
    folder = tmp_path / "boxes"
    (folder / "images").mkdir(parents=True)
    (folder / "images/page.png").write_bytes(png("navy", (100, 100)))
    (folder / "images/plain.png").write_bytes(png("pink", (84, 56)))
    many = [conversation_row(f"<image>{'Is it ' * (n % 40)}?", "no", ["images/plain.png"]) for n in range(100)]
    write(folder, "train", [*boxed_rows(), *many])
    recipe = recipe_of(folder, eval_strategy="no", load_best_model_at_end=False, max_length=2000)
    path = tmp_path / "preview.html"
    write_page(path, inspect(recipe), 5)
    browser.get(path.as_uri())
    return browser


def view(browser, width, scheme="light"):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_the_page_in_a_browser(page):
    def run(script):
        return page.execute_script(f"return {script}")

    for width in (375, 1280):
        view(page, width)
        assert run("document.documentElement.scrollWidth") <= width
        assert run("[...document.querySelectorAll('.plot svg')].every((svg) => svg.clientWidth > 150)")
        # Labels keep the size of text on a narrow page.
        assert run("parseFloat(getComputedStyle(document.querySelector('.plot .x')).fontSize)") > 11
    assert run("document.querySelectorAll('article').length") == 5
    assert run("document.querySelectorAll('.plot rect').length") > 20
    assert run("window.hacked") is None
    assert "</span><script>" in run("document.querySelector('article .text').textContent")
    learned = run("[...document.querySelectorAll('article .learned')].map((tag) => tag.textContent)")
    assert len(learned) == 5
    assert all(text.endswith("<|im_end|>") for text in learned)
    colors = "getComputedStyle(document.querySelector('article {}')).color"
    for scheme in ("light", "dark"):
        view(page, 1280, scheme)
        assert run(colors.format(".learned")) != run(colors.format(".text"))
    problems = [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not problems


def test_boxes_lie_where_the_model_learns_them(page):
    view(page, 1280)
    places = """(() => {
      const rect = (tag) => tag.getBoundingClientRect();
      const image = rect(document.querySelector('.image img')), box = rect(document.querySelector('.image rect'));
      return [(box.left - image.left) / image.width, (box.top - image.top) / image.height,
              box.width / image.width, box.height / image.height];
    })()"""
    assert page.execute_script(f"return {places}") == pytest.approx([0.25, 0.5, 0.5, 0.5], abs=0.03)
    text = "document.querySelector('.image text').textContent"
    assert page.execute_script(f"return {text}") == "the bar"


def test_a_page_needs_nothing_else(found):
    examples = list(read_examples(found.splits[0], found.encoder, 3))
    html = render(found, examples)
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|@import|url\(", html)
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)', html))
    assert len(examples) == 3 == html.count("<article")
    # The image is that of the patches that the model gets.
    assert examples[0].images[0].size == (112, 112)
