"""The page: its layout and its event handlers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from qwen_vl_sft.data.formats import FORMATS
from qwen_vl_sft.demo.examples import Example
from qwen_vl_sft.demo.naming import label, model_name, run_names
from qwen_vl_sft.demo.options import DemoOptions
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.answer_lines import describe
from qwen_vl_sft.inference.answering import Answer, Answerer, ask, read_image

MOST_IMAGES = 4
# Characters of a text that is sent; far above any question, far below what fills a GPU.
LONGEST_QUESTION, LONGEST_MESSAGE = 2000, 8000
# Uploads are looked through so often, and removed at such an age, in seconds.
CLEANING = (600, 3600)
# The lines below an answer while it is awaited, and before.
ANSWERING, STOPPED, NOTHING = "answering…", "stopped", "&nbsp;"


def build_page(answerer: Answerer, examples: Sequence[Example], options: DemoOptions) -> gr.Blocks:
    """Build the page of loaded models. The first run is selected at the start."""
    handlers = Handlers(answerer)
    with gr.Blocks(title="Base and tuned", analytics_enabled=False, delete_cache=CLEANING, fill_width=True) as page:
        gr.Markdown(f"# Base and tuned, side by side\n\n{handlers.facts()}")
        with gr.Row():
            with gr.Column(min_width=300):
                images = gr.Gallery(
                    label="Chart" if handlers.most_images == 1 else f"Images (up to {MOST_IMAGES})",
                    file_types=["image"], type="filepath", interactive=True, height=330, columns=2, object_fit="contain",
                    buttons=["fullscreen"], sources=["upload", "clipboard"], elem_id="images",
                )  # fmt: skip
            with gr.Column(min_width=300):
                chosen = gr.Dropdown(handlers.choices(), value=0, label="Tuned model", elem_id="adapter")
                question = gr.Textbox(
                    label="Question", lines=2, max_lines=6, max_length=LONGEST_QUESTION, elem_id="question",
                    placeholder="Which bar is the tallest?",
                )  # fmt: skip
                with gr.Row():
                    button = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", min_width=120)
        with gr.Row():
            said, times = [], []
            for arm, title in (("base", "Base"), ("tuned", "Tuned")):
                with gr.Column(min_width=300):
                    said.append(gr.Textbox(label=title, lines=3, interactive=False, elem_id=arm, buttons=["copy"]))
                    times.append(gr.Markdown(NOTHING, elem_id=f"{arm}-time"))
        gold = gr.Textbox(label="Right answer of the example", interactive=False, visible=False, elem_id="gold")
        with gr.Row():
            with gr.Column(min_width=300):
                message = gr.Textbox(
                    handlers.message(0), label="System message of the tuned model", lines=4, max_lines=16,
                    max_length=LONGEST_MESSAGE, elem_id="message", placeholder="none",
                )  # fmt: skip
            with gr.Column(min_width=300):
                base_too = gr.Checkbox(label="Give it to the base model too", elem_id="base-too")
                pixels = gr.Number(**handlers.pixels(0), precision=0, elem_id="pixels")
        add_examples(examples, images, question, gold)

        silent: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asked = [images, question, chosen, message, base_too, pixels]
        shown = [said[0], times[0], said[1], times[1]]
        running: Any = [
            button.click(handlers.answer, asked, shown, **silent),
            question.submit(handlers.answer, asked, shown, **silent),
        ]
        # Stopping ends the stream at once; without this the line below would still say that it runs.
        stop.click(
            lambda *lines: [STOPPED if line == ANSWERING else line for line in lines],
            times,
            times,
            cancels=running,
            **silent,
        )
        chosen.change(handlers.choose, chosen, [message, pixels], **silent)
        # The right answer belongs to the example as it was: another image or question hides it.
        for changed in (images.upload, images.delete, question.input):
            changed(lambda: gr.update(visible=False), None, gold, **silent)
    return page


def add_examples(examples: Sequence[Example], images: Any, question: Any, gold: Any) -> None:
    """Show the examples as pictures with their questions; a click on a question fills it in."""
    if not examples:
        return
    gr.Markdown("### Examples")
    with gr.Row():
        for number, example in enumerate(examples):
            with gr.Column(min_width=150, elem_classes="example"):
                gr.Image(
                    str(example.images[0]), interactive=False, show_label=False, container=False, buttons=[], height=130,
                    alt_text=f"Picture of the example: {example.question}",
                )  # fmt: skip
                button = gr.Button(
                    example.question, size="sm", elem_id=f"example-{number}", elem_classes="example-question"
                )
                button.click(_filler(example), None, [images, question, gold], api_visibility="private")


def _filler(example: Example) -> Callable[[], tuple[list[str], str, Any]]:
    files = [str(path) for path in example.images]
    return lambda: (files, example.question, gr.update(value=example.gold, visible=True))


class Handlers:
    """The page's event handlers, on one set of loaded models."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        formats = [FORMATS.get(source.recipe.data.dataset_format) for source in answerer.sources]
        self.most_images = max((found and found.most_images) or MOST_IMAGES for found in formats)

    def facts(self) -> str:
        """Return which base model answers, and in which precision."""
        settings = self.answerer.sources[0].recipe.model
        return f"Base model: {model_name(settings)}, in {settings.precision}."

    def choices(self) -> list[tuple[str, int]]:
        """Return the runs as the list shows them, with their indices."""
        sources = self.answerer.sources
        names = run_names(sources)
        return [
            (label(name, source.tuned), run_index)
            for run_index, (name, source) in enumerate(zip(names, sources, strict=True))
            if source.tuned
        ]

    def message(self, run_index: int) -> str:
        """Return a run's own system message."""
        return self.answerer.sources[run_index].system_message or ""

    def pixels(self, run_index: int) -> dict[str, Any]:
        """Build the field of the pixel limit, which can be lowered to the processor's smallest but not raised."""
        size = self.answerer.processors[run_index].image_processor.size
        low, high = size["shortest_edge"], size["longest_edge"]
        text = f"Most pixels of an image ({low:,} to {high:,}); larger ones are reduced"
        return {"value": high, "minimum": low, "maximum": high, "label": text}

    def choose(self, run_index: int) -> tuple[str, Any]:
        """Switch to another run: restore its own system message and pixel limit."""
        return self.message(run_index), gr.update(**self.pixels(run_index))

    def answer(
        self,
        files: list[tuple[str, Any]] | None,
        question: str,
        run_index: int,
        message: str,
        base_too: bool,
        pixels: int | None,
    ) -> Iterator[tuple[str, str, str, str]]:
        """Answer with the base model, then with the tuned one, as a stream."""
        shown = ["", NOTHING, "", NOTHING]
        try:
            conversation = ask(question, self.read(files or []))
            most = self.answerer.sources[run_index].recipe.run.max_new_tokens
            for number, arm in enumerate(("prompted" if base_too else "base", "tuned")):
                shown[2 * number + 1] = ANSWERING
                yield tuple(shown)  # type: ignore[misc]
                encoder = self.answerer.encoder(arm, run_index, message, int(pixels) if pixels else None)
                for said in self.answerer.stream(conversation, arm, encoder, most, run_index):
                    shown[2 * number : 2 * number + 2] = [said.text, self.time(said)]
                    yield tuple(shown)  # type: ignore[misc]
        except UserError as error:
            yield tuple(NOTHING if line == ANSWERING else line for line in shown)  # type: ignore[misc]
            raise gr.Error("; ".join(error.problems), duration=15, print_exception=False) from None

    def read(self, files: Sequence[tuple[str, Any]]) -> list[Any]:
        """Return the uploaded files as images, under the names their owner gave them. Raises `UserError`."""
        if not files:
            raise UserError("there is no image; upload one, or pick an example")
        if len(files) > self.most_images:
            raise UserError(f"there are {len(files)} images; give {self.most_images} at most")
        return [read_image(path, Path(path).name) for path, _ in files]

    def time(self, answer: Answer) -> str:
        """Return the line below an answer."""
        if answer.finished and not answer.text:
            return f"{describe(answer)}; the answer is empty"
        return describe(answer) if answer.finished else ANSWERING


def style() -> str:
    """Return the page's CSS."""
    return resources.files("qwen_vl_sft.demo").joinpath("page.css").read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Return a theme with the visitor's own fonts, so that nothing is fetched, and a button with enough contrast."""
    fonts = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = gr.themes.Font("monospace")
    look = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=mono)
    return look.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
