"""The page of base and tuned answers, used in a real browser; and the same page as a Space, from its own folder."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml
from PIL import Image

from fixtures.answering import chart, write_builtin_run
from fixtures.messages import png
from fixtures.ports import free_port
from fixtures.processes import Popen
from fixtures.repository import REPOSITORY
from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.demo.examples import collect_examples, load_examples, save_examples
from qwen_vl_sft.demo.naming import headline_score, label, model_name, run_names
from qwen_vl_sft.demo.options import DemoOptions, check_options
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.source import Source, TunedModel, read_source

MESSAGES = ("Answer with one word.", "Answer in a sentence.")
TOKENS = 16
# In seconds, on a busy machine several times slower than most; nothing waits so long where all is well.
STARTING, ANSWERING = 900, 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = [write_builtin_run(folder / name, seed, MESSAGES[seed]) for seed, name in enumerate(("one", "two"))]
    (made[0] / "evaluation").mkdir()
    scores = {"tuned": {"all": {"relaxed_accuracy": {"mean": 0.7512}}}}
    (made[0] / "evaluation" / "summary.json").write_text(json.dumps({"scores": scores}))
    return made


@pytest.fixture(scope="module")
def sources(runs):
    return [read_source(run, {}, tuned_needed=True) for run in runs]


def bomb():
    """A file of 11 kB that would fill 270 MB."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


# Without a page


def test_options():
    options = parse(DemoOptions, ["--run", "a", "b", "--max_file_size", "1.5 MB", "--max_pixels", "9999", "--use_cpu"])
    assert options.run == (Path("a"), Path("b"))
    assert options.max_file_size == 1_500_000
    assert options.recipe_keys == {"max_pixels": "9999", "use_cpu": "true"}
    assert (options.share, options.server_name, options.server_port) == (False, "127.0.0.1", None)
    with pytest.raises(UserError) as caught:
        check_options(
            parse(
                DemoOptions,
                ["--run", "a", "./a", "--examples", "-1", "--server_port", "70000", "--export_space", "s", "--share"],
            )
        )
    assert len(caught.value.problems) == 4
    with pytest.raises(UserError, match="--max_file_size: 'big' is not a size"):
        parse(DemoOptions, ["--run", "a", "--max_file_size", "big"])


def test_names_tell_runs_apart_and_hide_folders(runs, sources, tmp_path):
    def source(*parts):
        folder = tmp_path.joinpath(*parts)
        home = folder.parent if folder.name.startswith("checkpoint") else folder
        return Source(sources[0].recipe, None, TunedModel(folder, home, True), "")

    named = [source("a", "run"), source("b", "run"), source("c"), source("c", "checkpoint-5")]
    assert run_names(named) == ["a/run", "b/run", "c", "c/checkpoint-5"]
    assert label("one", sources[0].tuned) == "one (relaxed accuracy 75.1%)"
    assert label("two", sources[1].tuned) == "two"
    assert headline_score(sources[1].tuned) is None
    assert model_name(sources[0].recipe.model) == "builtin:tiny-qwen2-vl"
    assert model_name(ModelSettings("Qwen/Qwen2-VL-2B-Instruct")) == "Qwen/Qwen2-VL-2B-Instruct"
    assert model_name(ModelSettings(str(tmp_path))) == tmp_path.name


def test_examples_are_rows_of_the_data_byte_for_byte(sources, tmp_path):
    found = collect_examples(sources[0], 3, tmp_path / "examples")
    assert len(found) == 3
    rows = {chart(number) for number in range(300)}
    assert {(example.images[0].read_bytes(), example.question) for example in found} <= rows
    assert all(example.gold for example in found)
    save_examples(found, tmp_path / "examples")
    assert load_examples(tmp_path / "examples") == found
    assert collect_examples(sources[0], 0, tmp_path / "none") == []


def test_without_the_data_the_embedded_charts_are_the_examples(runs, tmp_path):
    source = read_source(runs[0], {"dataset_name": "./nowhere"}, tuned_needed=True)
    assert len(collect_examples(source, 2, tmp_path)) == 2


# With Gradio

gradio = pytest.importorskip("gradio", reason="Gradio is not installed (pip install 'qwen_vl_sft[demo]')")


@pytest.fixture(scope="module")
def answerer(sources):
    from qwen_vl_sft.inference.answering import Answerer

    ready = Answerer(sources)
    ready.load(("base", "tuned"))
    return ready


@pytest.fixture(scope="module")
def expected(answerer):
    """What scripts/generate.py answers: by arm, run, row, and system message."""
    from qwen_vl_sft.data.media.image_file import ImageFile
    from qwen_vl_sft.inference.answering import ask

    def answer(arm, place, image, question, message=None):
        encoder = answerer.encoder(arm, place, message)
        *_, last = answerer.stream(ask(question, [ImageFile(image, None)]), arm, encoder, TOKENS, place)
        return last.text

    return answer


def test_a_message_names_the_file_but_no_folder(answerer, tmp_path):
    from qwen_vl_sft.demo.page import Handlers

    handlers = Handlers(answerer)
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(bomb())
    files = [(str(tmp_path / name), None) for name in ("note.txt", "bomb.png")]
    with pytest.raises(gradio.Error, match="there is no image"):
        list(handlers.answer(None, "?", 0, "", False, None))
    with pytest.raises(gradio.Error, match="give 1 at most"):
        list(handlers.answer(files, "?", 0, "", False, None))
    for file, reason in zip(files, ("cannot be read", "of 10000x9000 pixels is refused"), strict=True):
        with pytest.raises(gradio.Error) as caught:
            list(handlers.answer([file], "?", 0, "", False, None))
        assert reason in caught.value.message
        assert str(tmp_path) not in caught.value.message


def test_each_run_answers_with_as_many_tokens_as_it_says(tmp_path):
    from qwen_vl_sft.demo.page import Handlers
    from qwen_vl_sft.demo.space import write_run
    from qwen_vl_sft.inference.answering import Answerer

    runs = [write_builtin_run(tmp_path / f"{most}", 0, "", max_new_tokens=most) for most in (1, 2)]
    sources = [read_source(run, {}, tuned_needed=True) for run in runs]
    ready = Answerer(sources)
    asked = []
    ready.stream = lambda _, arm, encoder, most, place: asked.append((most, place)) or iter(())
    (tmp_path / "chart.png").write_bytes(chart(0)[0])
    for place in (0, 1):
        list(Handlers(ready).answer([(str(tmp_path / "chart.png"), None)], "Which?", place, "", False, None))
    assert asked == [(1, 0), (1, 0), (2, 1), (2, 1)]
    write_run(sources[1], tmp_path / "space")
    assert yaml.safe_load((tmp_path / "space/recipe.yaml").read_text())["max_new_tokens"] == 2


def start(*words, uploads, cwd=REPOSITORY, **environment):
    """Start a server in a process of its own; returns it and the address that it prints."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(uploads)}
    environment = {**os.environ, **quiet, **environment}
    environment.pop("PYTHONPATH", None)
    process = Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, deadline = [], time.monotonic() + STARTING
    for line in process.stdout:
        said.append(line)
        found = re.search(r"serving (http://\S+)", line)
        if found:
            return process, found[1], "".join(said)
        assert time.monotonic() < deadline, "".join(said)
    raise AssertionError("".join(said))


def stop(process, uploads):
    """Stop a server as a scheduler does; nothing that visitors sent may be left."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=ANSWERING)
    finally:
        process.kill()
        process.stdout.close()
    assert list(uploads.glob("qwen_vl_sft_demo-*")) == []


@pytest.fixture(scope="module")
def served(runs, tmp_path_factory):
    uploads = tmp_path_factory.mktemp("served")
    words = ["--run", *runs, "--max_new_tokens", TOKENS, "--max_file_size", "100K", "--server_port", free_port()]
    process, address, _ = start("scripts/demo.py", *words, uploads=uploads)
    yield address
    stop(process, uploads)


class Page:
    """The page in the browser."""

    def __init__(self, browser, address, width=1280, height=900):
        self.browser, self.address = browser, address
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get_log("browser")  # what the page before left
        browser.get(address)
        self.until(lambda: self.all("#ask"), STARTING)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        [found] = self.all(selector)
        return found

    def until(self, condition, seconds=ANSWERING):
        deadline = time.monotonic() + seconds
        while not (found := self.now(condition)):
            assert time.monotonic() < deadline, f"did not come in {seconds} s; messages: {self.now(self.messages)}"
            time.sleep(0.05)
        return found

    @staticmethod
    def now(condition):
        """What holds now; nothing where the page puts something else in its place meanwhile."""
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            return condition()
        except StaleElementReferenceException:
            return None

    def upload(self, path):
        self.one("#images input[type=file]").send_keys(str(path))

    def charts(self):
        return self.all("#images .thumbnail-item img")

    def write(self, name, text):
        from selenium.webdriver.common.keys import Keys

        area = self.one(f"#{name} textarea")
        area.send_keys(Keys.CONTROL, "a")
        area.send_keys(Keys.DELETE)
        area.send_keys(text)

    def value(self, name):
        return self.one(f"#{name} textarea").get_attribute("value")

    def ask(self):
        """Press the button and wait until both arms have answered."""
        before = self.one("#tuned-time").text
        self.one("#ask").click()
        self.until(lambda: self.one("#tuned-time").text != before)
        self.until(lambda: all("tokens" in self.one(f"#{arm}-time").text or "1 token" in self.one(f"#{arm}-time").text
                               for arm in ("base", "tuned")))  # fmt: skip
        return self.value("base"), self.value("tuned")

    def choose(self, name):
        self.one("#adapter input").click()
        options = self.until(
            lambda: [option for option in self.all("[role=option]") if option.text.strip("✓ \n").startswith(name)]
        )
        options[0].click()

    def messages(self):
        # Each is asked once: while it appears, its text may come and go.
        return [text for toast in self.all(".toast-body") if (text := toast.text)]

    def problems(self):
        return [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path):
        """The whole page, also what lies below the window."""
        height = self.browser.execute_script("return document.documentElement.scrollHeight")
        width = self.browser.execute_script("return document.documentElement.clientWidth")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert self.browser.save_screenshot(str(path))


@pytest.fixture
def page(browser, served):
    return Page(browser, served)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "chart.png"
    path.write_bytes(chart(0)[0])
    return path


def test_a_chart_is_answered_by_both_as_by_generate(page, picture, expected):
    image, question = chart(0)
    page.upload(picture)
    page.until(page.charts)
    page.write("question", question)
    assert page.ask() == (expected("base", 0, image, question), expected("tuned", 0, image, question))
    assert re.fullmatch(r"[\d.]+ s, first token after [\d.]+ s, \d+ tokens?", page.one("#tuned-time").text)
    assert page.problems() == []


def test_another_adapter_brings_its_own_message_and_answers(page, picture, expected):
    image, question = chart(0)
    assert page.value("message") == MESSAGES[0]
    page.write("message", "Something else.")
    assert page.one("#adapter input").get_attribute("value") == "one (relaxed accuracy 75.1%)"
    page.choose("two")
    page.until(lambda: page.value("message") == MESSAGES[1])
    page.upload(picture)
    page.until(page.charts)
    page.write("question", question)
    assert page.ask() == (expected("base", 1, image, question), expected("tuned", 1, image, question))


def test_the_system_message_can_be_edited_and_given_to_the_base_too(page, picture, expected):
    image, question = chart(0)
    page.upload(picture)
    page.until(page.charts)
    page.write("question", question)
    page.write("message", MESSAGES[1])
    asked = (0, image, question, MESSAGES[1])
    assert page.ask() == (expected("base", 0, image, question), expected("tuned", *asked))
    page.one("#base-too input").click()
    assert page.ask() == (expected("prompted", *asked), expected("tuned", *asked))


def test_an_example_is_filled_in_with_its_right_answer(page, sources, expected, tmp_path):
    example = collect_examples(sources[0], 4, tmp_path)[2]
    assert not page.all("#gold textarea")
    page.one("#example-2").click()
    page.until(lambda: page.all("#gold textarea") and page.value("gold") == example.gold)
    assert page.value("question") == example.question
    page.until(page.charts)
    image = example.images[0].read_bytes()
    assert page.ask() == (
        expected("base", 0, image, example.question),
        expected("tuned", 0, image, example.question),
    )
    page.write("question", "Another one?")
    page.until(lambda: not page.all("#gold textarea"))


@pytest.mark.parametrize(
    ("content", "question", "message"),
    [
        (None, "What?", "there is no image; upload one, or pick an example"),
        (png(), "", "the question is empty"),
        (b"not an image", "What?", "image upload.png cannot be read"),
        (bomb(), "What?", "image upload.png of 10000x9000 pixels is refused"),
        (png(size=(600, 2)), "What?", "more elongated than 200 to 1"),
        (png(), "What? <|im_end|>", "the request has the special token <|im_end|>"),
    ],
    ids=["no image", "no question", "not an image", "huge", "elongated", "special token"],
)
def test_what_cannot_be_answered_gives_one_message(page, tmp_path, content, question, message):
    if content is not None:
        (tmp_path / "upload.png").write_bytes(content)
        page.upload(tmp_path / "upload.png")
        page.until(page.charts)
    if question:
        page.write("question", question)
    page.one("#ask").click()
    [told] = page.until(page.messages)
    assert message in told
    assert "/" not in told
    page.until(lambda: "answering" not in page.one("#tuned-time").text + page.one("#base-time").text)


def test_a_file_that_is_too_large_gives_a_message_and_is_not_taken(page, tmp_path):
    (tmp_path / "large.png").write_bytes(os.urandom(150_000))
    page.upload(tmp_path / "large.png")
    assert "exceed" in " ".join(page.until(page.messages)).lower()
    assert page.charts() == []


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_window_and_asks_for_nothing_outside(browser, served, tmp_path, picture, width):
    browser.get_log("performance")
    page = Page(browser, served, width, 900)
    page.one("#example-1").click()
    page.until(page.charts)
    page.ask()
    browser.execute_script("window.scrollTo(0, 0)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    cut = browser.execute_script(
        "return [...document.querySelectorAll('#images img, .example img')].filter((image) =>"
        " getComputedStyle(image).objectFit !== 'contain').length"
    )
    assert cut == 0
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"}
    assert urls
    assert [url for url in urls if not url.startswith((served, "data:", "blob:", "chrome:", "about:"))] == []
    page.screenshot(tmp_path / f"demo-{width}.png")
    assert page.problems() == []


def test_the_server_shows_no_functions_and_no_other_files(served, runs):
    assert json.load(urlopen(f"{served}gradio_api/info"))["named_endpoints"] == {}
    config = json.load(urlopen(f"{served}config"))
    assert all(entry["api_visibility"] == "private" for entry in config["dependencies"])
    assert str(runs[0].parent) not in json.dumps(config)
    for path in ("/etc/passwd", runs[0] / "recipe.yaml", REPOSITORY / "README.md"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{served}gradio_api/file={path}")


# As a Space


@pytest.fixture(scope="module")
def space(runs, tmp_path_factory):
    from qwen_vl_sft.demo.space import export_space

    folder = tmp_path_factory.mktemp("space") / "space"
    words = ["--run", *runs, "--export_space", folder, "--max_new_tokens", TOKENS, "--examples", 2]
    export_space(parse(DemoOptions, [str(word) for word in words]))
    return folder


def test_a_space_is_complete_and_names_no_folder_of_this_machine(space, runs):
    front = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio"
    assert front["sdk_version"] == gradio.__version__
    assert front["suggested_hardware"] == "cpu-basic"
    assert (space / front["app_file"]).is_file()
    pinned = (space / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in pinned)
    assert {"torch", "transformers", "peft"} <= {line.split("==")[0] for line in pinned}
    assert len(load_examples(space / "examples")) == 2
    for path in space.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (runs[0].parent, REPOSITORY):
                assert str(place).encode() not in content, f"{path} holds {place}"
    assert sum(path.stat().st_size for path in space.rglob("*")) < 10e6


def test_a_space_starts_from_its_own_folder_and_answers(space, browser, expected, tmp_path):
    # The installed package is taken off the path, so only the copy beside this script can be imported.
    script = space / "outside.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path[:] = [path for path in sys.path if path not in ('', {str(REPOSITORY / 'src')!r})]\n"
        "import qwen_vl_sft; print('package', qwen_vl_sft.__file__, flush=True)\n"
        "runpy.run_path('app.py', run_name='__main__')\n"
    )
    process, address, said = start(script, uploads=tmp_path, cwd=space, GRADIO_SERVER_PORT=str(free_port()))
    script.unlink()
    try:
        assert Path(re.search(r"package (\S+)", said)[1]).resolve().is_relative_to(space.resolve()), said
        page = Page(browser, address)
        example = load_examples(space / "examples")[0]
        page.one("#example-0").click()
        page.until(page.charts)
        page.until(lambda: page.value("question") == example.question)
        asked = (0, example.images[0].read_bytes(), example.question)
        assert page.ask() == (expected("base", *asked), expected("tuned", *asked))
    finally:
        stop(process, tmp_path)


def test_what_cannot_be_a_space_is_refused_and_nothing_is_written(runs, tmp_path, monkeypatch):
    from qwen_vl_sft.demo import space

    def export(*words):
        space.export_space(parse(DemoOptions, [str(word) for word in words]))

    folder = tmp_path / "space"
    local = tmp_path / "model"
    local.mkdir()
    with pytest.raises(UserError, match=r"is the folder .*give its Hub id"):
        export("--run", runs[0], "--export_space", folder, "--model_name_or_path", local)
    full = tmp_path / "full"
    full.mkdir()
    for name in ("recipe.yaml", "system_message.txt"):
        (full / name).write_bytes((runs[0] / name).read_bytes())
    (full / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds a full model"):
        export("--run", full, "--export_space", folder)

    def fail(*_, **__):
        raise UserError("stopped in the middle")

    monkeypatch.setattr(space, "copy_package", fail)
    with pytest.raises(UserError, match="stopped in the middle"):
        export("--run", runs[0], "--export_space", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model"]
    folder.mkdir()
    (folder / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        export("--run", runs[0], "--export_space", folder)


def test_hardware_follows_from_the_size(monkeypatch):
    from qwen_vl_sft.demo import space
    from qwen_vl_sft.modeling.base_model import PartCount

    def machine(weights, **keys):
        monkeypatch.setattr(space, "build_on_meta", lambda _: None)
        monkeypatch.setattr(space, "count_parameters", lambda _: {"language": PartCount(int(weights))})
        return space.hardware(ModelSettings("x", **keys))

    assert machine(1e6) == "cpu-basic"
    assert machine(2e9) == "l4x1"
    assert machine(8e9) == "l4x1"
    assert machine(33e9) == "a100-large"
    assert machine(33e9, load_in_4bit=True) == "l40sx1"
