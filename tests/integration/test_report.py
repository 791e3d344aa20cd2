"""The page of an evaluation: kinds of errors, nothing unescaped, charts of a bounded size; and used in a real browser."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from fixtures.messages import png
from fixtures.processes import run_process
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.evaluation.error_kinds import CATEGORY, EMPTY, KINDS, OTHER_NUMBER, VERBOSE, WITHIN, error_kind
from qwen_vl_sft.evaluation.report import EMBEDDED_ROWS, page_data, render, write_report
from qwen_vl_sft.evaluation.report_images import COPIED_BYTES, IMAGES_FOLDER, MAX_WIDTH, embed, write_beside
from qwen_vl_sft.evaluation.scoring import Question, score_row, summarise
from qwen_vl_sft.html_page import to_script_json

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&amp; {{data}} \u2028 <!--"
)
ARMS = ("base", "prompted", "tuned")


@pytest.mark.parametrize(
    ("answer", "golds", "kind"),
    [
        ("", ["12"], EMPTY),
        (" \n", ["red"], EMPTY),
        ("The tallest bar is Red.", ["red"], VERBOSE),
        ("Yes, it is.", ["Yes"], VERBOSE),
        ("about 12 million", ["12"], VERBOSE),
        ("about 1,200 people", ["1200"], VERBOSE),
        ("hundred", ["red"], CATEGORY),
        ("blue", ["red"], CATEGORY),
        ("none", ["12"], CATEGORY),
        ("12", ["red"], CATEGORY),
        ("non-red", ["red"], CATEGORY),
        ("10.8", ["10"], WITHIN),
        ("-10.8", ["-10"], WITHIN),
        ("The value is 10.8.", ["10"], WITHIN),
        ("1,200", ["1200"], WITHIN),
        ("66%", ["0.62"], WITHIN),
        ("$54", ["$50"], WITHIN),
        ("11.5", ["10"], OTHER_NUMBER),
        ("-5", ["5"], OTHER_NUMBER),
        ("\u22125", ["5"], OTHER_NUMBER),
        ("5.2", ["5000"], OTHER_NUMBER),
        ("0.1", ["0"], OTHER_NUMBER),
        ("12", ["red", "11"], WITHIN),
        ("12 red ones", ["11", "red"], VERBOSE),
    ],
)
def test_kinds_of_wrong_answers(answer, golds, kind):
    assert error_kind(answer, golds) == kind


def scored(row_id, gold, split=None, question="How many?", **answers):
    return score_row(Question(row_id, question, gold if isinstance(gold, list) else [gold], split), answers)


def fake_rows(number=120):
    """Rows of every kind in turn; the first one is hostile."""
    rows = [scored(0, HOSTILE, "human", HOSTILE, base="x", prompted=HOSTILE + " indeed", tuned=HOSTILE)]
    for row_id in range(1, number):
        split = ("human", "machine")[row_id % 2]
        base, tuned = [
            ("The value is 50.", "50"),  # the tuned arm wins
            ("50", "54"),  # and loses
            ("", "90"),  # all wrong
            ("50", "50"),  # all right
            ("red", ""),
        ][row_id % 5]
        question = f"What is the value of bar {row_id}?"
        rows.append(scored(row_id, "50", split, question, base=base, prompted=base, tuned=tuned))
    return rows


def fake_summary(rows, arms=ARMS):
    return summarise(rows, arms) | {
        "dataset": "charts <b>[test]",
        "settings": {"run": "runs/one", "model_name_or_path": "some/model"},
        "precision": {"scored": "bfloat16", "trained": "4-bit", "scored_as_trained": False},
        "environment": {"versions": {"torch": "2.11.0", "deepspeed": None}},
    }


def charts(row_id):
    return [ImageFile(png(("red", "blue")[row_id % 2], (300, 200)), None)]


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_texts_cannot_leave_their_place():
    rows = fake_rows(3)
    page = render(rows, fake_summary(rows), charts)
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert "charts &lt;b&gt;[test]" in page
    assert data_of(page)["rows"][0]["question"] == HOSTILE


def test_names_of_arms_splits_and_runs_are_escaped():
    rows = [scored(0, "1", "<i>half", **{"<u>arm": "2", "b": "1"})]
    summary = fake_summary(rows, ["<u>arm", "b"]) | {"settings": {"run": "<s>run"}}
    page = render(rows, summary)
    assert not re.search("<(i>|u>|s>)", page)
    assert "&lt;u&gt;arm" in page


def test_a_lone_surrogate_can_be_written(tmp_path):
    rows = [scored(0, "1", base="\ud83d")]
    write_report(tmp_path, rows, summarise(rows, ["base"]))
    assert data_of((tmp_path / "report.html").read_text(encoding="utf-8"))["rows"][0]["arms"][0][0] == "\ud83d"


def test_script_json_is_json():
    value = {"a": [HOSTILE, 1, None, True]}
    assert json.loads(to_script_json(value)) == value
    assert not re.search("[<>&\u2028]", to_script_json(value))


def test_the_page_asks_for_nothing_outside():
    rows = fake_rows(3)
    page = re.sub(
        r'<script type="application/json".*?</script>', "", render(rows, fake_summary(rows), charts), flags=re.S
    )
    assert not re.search(r"https?:|@import|url\(", page)
    assert set(re.findall(r'(?:src|href)="([^"]*)', page)) == {"data:,"}
    assert "default-src 'none'" in page


def test_what_was_evaluated_is_printed():
    rows = fake_rows(20)
    page = render(rows, fake_summary(rows))
    for text in (
        "runs/one",
        "some/model",
        "bfloat16; trained in: 4-bit",
        "<dd>20</dd>",
        "torch 2.11.0",
        "tuned − base",  # noqa: RUF001
    ):
        assert text in page
    assert "deepspeed" not in page


def test_rows_that_were_left_out_are_told():
    rows = fake_rows(4)
    summary = fake_summary(rows)
    assert "Left out" not in render(rows, summary)
    assert "<dt>Left out</dt><dd>2, which could not be read</dd>" in render(rows, summary | {"skipped_rows": 2})


def test_rows_share_an_equal_chart_and_are_judged_by_relaxed_accuracy():
    data = page_data(fake_rows(7), list(ARMS), charts)
    assert [row["charts"] for row in data["rows"]] == [[0], [1], [0], [1], [0], [1], [0]]
    assert len(data["images"]) == 2
    assert data["rows"][1]["arms"] == [["50", True, None], ["50", True, None], ["54", False, WITHIN]]
    assert data["rows"][2]["arms"][0] == ["", False, EMPTY]


def test_charts_are_scaled_down_and_small():
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((1200, 800), Image.Resampling.BICUBIC)
    for image, width in ((photo, MAX_WIDTH), (Image.new("RGB", (56, 40), "red"), 56)):
        uri, *size = embed(image)
        decoded = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert size == list(decoded.size)
        assert decoded.width == width
        assert uri.startswith(f"data:image/{decoded.format.lower()};base64,")
        assert len(uri) < 60_000


def test_250_real_rows_stay_small(shared):
    from qwen_vl_sft.data.dataset import open_rows

    rows = open_rows(str(shared / "chartqa"), "test")
    answered = [scored(row_id, "1", base="1") for row_id in range(len(rows))]
    read = lambda row_id: rows.conversation(rows.dataset[row_id]).media  # noqa: E731
    assert len(render(answered, summarise(answered, ["base"]), read)) < 15e6 * len(rows) / 250


def test_small_files_are_copied_and_large_ones_made_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (400, 600, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    (tmp_path / "chart.png").write_bytes(png(size=(960, 300)))
    small, large = ImageFile(None, str(tmp_path / "chart.png")), ImageFile(buffer.getvalue(), None)
    folder = tmp_path / IMAGES_FOLDER
    folder.mkdir()
    shown = [write_beside(folder, file) for file in (small, large)]
    assert [size for _, *size in shown] == [[480, 150], [480, 320]]
    copied, made = (tmp_path / address for address, *_ in shown)
    assert copied.read_bytes() == png(size=(960, 300))
    assert made.stat().st_size < len(buffer.getvalue()) > COPIED_BYTES
    assert Image.open(made).size == (480, 320)


@pytest.mark.parametrize("arms", [("base",), ("tuned",), ("base", "prompted"), ("predictions",)])
def test_any_arms_will_do(arms):
    rows = [scored(0, "1", **dict.fromkeys(arms, "2")), scored(1, "1", **dict.fromkeys(arms, "1"))]
    page = render(rows, summarise(rows, arms))
    assert data_of(page)["arms"] == list(arms)
    assert ("Arms against each other" in page) == (len(arms) > 1)


def test_predictions_get_a_page_too(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prediction": "The bar is red.", "answer": "red", "question": HOSTILE}) + "\n")
    finished = run_process("scripts/evaluate.py", "--predictions", path, "--output_dir", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    row = data_of((tmp_path / "out" / "report.html").read_text())["rows"][0]
    assert row == {"id": 0, "question": HOSTILE, "gold": ["red"], "split": None, "charts": [], "arms": row["arms"]}
    assert row["arms"] == [["The bar is red.", False, VERBOSE]]


def test_a_row_of_a_capped_evaluation_keeps_its_own_chart(tmp_path):
    from qwen_vl_sft.data.dataset import open_rows, select_evenly
    from qwen_vl_sft.evaluation.evaluate import charts_of
    from qwen_vl_sft.evaluation.task import Task

    lines = []
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(png(size=(30 + number, 30)))
        turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "1"}]
        lines.append(json.dumps({"messages": turns, "images": [f"{number}.png"]}) + "\n")
    (tmp_path / "test.jsonl").write_text("".join(lines))
    rows = select_evenly(open_rows(str(tmp_path), "test"), 3)
    questions = [Question(raw["row_id"], "?", ["1"], None) for raw in rows.dataset]
    charts_by_row = charts_of(Task(rows, questions, [], ("base",), "", None, ""))
    assert {row_id: charts_by_row(row_id)[0].open().width for row_id in (0, 3, 6)} == {0: 30, 3: 33, 6: 36}


# In a browser


class Page:
    """A report in the browser."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get(path.as_uri())

    def view(self, width, height, scheme):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script):
        return self.browser.execute_script(f"return {script}")

    def button(self, label):
        return self.browser.find_element("css selector", f'[data-filter="{label}"]')

    def buttons(self):
        return self.run("[...document.querySelectorAll('[data-filter]')].map((button) => button.dataset.filter)")

    def count(self, label):
        return int(self.button(label).text.split()[-1].replace(",", ""))

    def click(self, label):
        """Press a filter and return how many rows it leaves; what it promised and what is there agree."""
        promised = self.count(label)
        self.button(label).click()
        assert self.total() == promised
        assert len(self.ids()) == min(promised, 50)
        return promised

    def total(self):
        return int(
            self.run("document.getElementById('shown').textContent").split(" of ")[1].split()[0].replace(",", "")
        )

    def ids(self):
        found = self.run("[...document.querySelectorAll('article .row')].map((tag) => tag.textContent)")
        return [int(text.split()[1]) for text in found]

    def problems(self):
        return [entry for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture
def open_report(browser, tmp_path):
    def show(rows, arms=ARMS, charts=charts):
        write_report(tmp_path, rows, fake_summary(rows, arms), charts)
        page = Page(browser, tmp_path / "report.html")
        page.view(1280, 900, "light")
        return page

    return show


def test_filters_show_what_they_count(open_report):
    rows = fake_rows()
    page = open_report(rows)
    right = {row["row_id"]: [row["arms"][arm]["relaxed_accuracy"] == 1 for arm in ARMS] for row in rows}
    wins = [row_id for row_id, (base, prompted, tuned) in right.items() if tuned and not (base and prompted)]
    loses = [row_id for row_id, (base, prompted, tuned) in right.items() if not tuned and (base or prompted)]
    assert page.total() == 120
    assert len(page.ids()) == 50
    assert page.click("tuned wins") == len(wins)
    assert page.ids() == wins
    assert page.click("tuned loses") == len(loses)
    assert page.ids() == loses
    assert page.click("machine") == sum(row_id % 2 for row_id in loses)
    assert page.click("wrong number within 10%") == sum(row_id % 2 for row_id in loses)
    assert page.count("other wrong number") == 0
    assert page.click("all") == 120
    assert page.click("all wrong") == sum(not any(of_row) for of_row in right.values())
    page.button("all wrong").click()
    assert page.total() == 120
    assert page.click("human") == 60
    page.click("all")
    kinds = {kind: page.count(label) for kind, label in KINDS.items()}
    assert kinds == {WITHIN: 24, OTHER_NUMBER: 24, CATEGORY: 0, VERBOSE: 0, EMPTY: 24}
    page.button("base").click()
    assert page.click("verbose") == 23
    page.button("any arm").click()
    assert page.click("empty") == 48
    assert page.problems() == []


def test_search_and_more(open_report):
    page = open_report(fake_rows())
    more = page.browser.find_element("id", "more")
    assert more.text == "Show 50 more"
    more.click()
    assert len(page.ids()) == 100
    assert page.run("document.activeElement.textContent").startswith("row 50")
    more.click()
    assert page.ids() == list(range(120))
    assert not more.is_displayed()
    search = page.browser.find_element("id", "search")
    search.send_keys("BAR 11")
    assert page.ids() == [11, *range(110, 120)]
    assert page.click("tuned wins") == 2
    page.click("all")
    assert (search.get_attribute("value"), page.total()) == ("", 120)
    search.send_keys("<img src=x\n")
    assert page.ids() == [0]
    assert page.problems() == []


def test_hostile_texts_show_as_texts(open_report):
    page = open_report(fake_rows(1))
    article = page.browser.find_element("tag name", "article")
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelector('.question').textContent") == HOSTILE
    assert page.run(
        "[...document.querySelectorAll('article img')].map((image) => image.complete && image.naturalWidth)"
    ) == [300]
    assert "onerror='window.hacked = 1'" in article.text
    assert page.problems() == []


def test_the_keyboard_reaches_filters_and_rows(open_report):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = open_report(fake_rows())
    reached = []
    for _ in range(40):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        reached.append(page.run("document.activeElement.dataset.filter || document.activeElement.id"))
        if reached[-1] == "tuned wins":
            ActionChains(page.browser).send_keys(Keys.ENTER).perform()
            assert page.total() < 120
            ActionChains(page.browser).send_keys(Keys.SPACE).perform()
            assert page.total() == 120
    assert [name for name in reached if name][: len(page.buttons()) + 2] == [*page.buttons(), "search", "more"]


@pytest.mark.parametrize("arms", [("tuned",), ("base", "prompted")])
def test_without_a_tuned_arm_to_compare_there_are_no_wins(open_report, arms):
    rows = [row | {"arms": {arm: row["arms"][arm] for arm in arms}} for row in fake_rows(20)]
    page = open_report(rows, arms, charts=None)
    assert page.buttons()[:2] == ["all", "all wrong"]
    assert page.click("all wrong") < 20
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.problems() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 800)])
def test_the_page_fits_its_window(open_report, tmp_path, width, height, scheme):
    page = open_report(fake_rows())
    page.view(width, height, scheme)
    assert page.run("document.documentElement.scrollWidth") <= width
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    for place, target in (("top", "h1"), ("rows", "#filters")):
        page.browser.execute_script(f"document.querySelector('{target}').scrollIntoView()")
        assert page.browser.save_screenshot(str(tmp_path / f"{width}-{scheme}-{place}.png"))
    assert page.problems() == []


def test_thousands_of_rows_stay_usable(open_report, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    page = open_report(fake_rows(2500))
    assert EMBEDDED_ROWS < 2500
    assert page.count("all") == 2500
    # Charts beside the page, each once.
    assert len(list((tmp_path / IMAGES_FOLDER).iterdir())) == 2
    page.browser.execute_script("document.querySelector('article:nth-child(2)').scrollIntoView()")
    images = "[...document.querySelectorAll('article img')].slice(0, 2)"
    WebDriverWait(page.browser, 300).until(
        lambda _: page.run(f"{images}.map((image) => image.naturalWidth)") == [300, 300]
    )
    assert all(
        address.startswith(f"{IMAGES_FOLDER}/") for address in page.run(f"{images}.map((i) => i.getAttribute('src'))")
    )
    assert len(page.ids()) == 50
    click = (
        "const began = performance.now(); document.querySelector('[data-filter=\"all wrong\"]').click();"
        "return performance.now() - began"
    )
    # The least of some, since other programs may have the CPU meanwhile.
    assert min(page.browser.execute_script(click) for _ in range(5)) < 1500
    assert page.problems() == []
