"""Answer one conversation at a time as a stream of text, with a base model and any number of runs on it.

The prompt and the decoding are those of an evaluation, so the whole answer is the one that an evaluation scores.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.distributed.context import read_context
from qwen_vl_sft.errors import BadRow, UserError, first_line, raise_all
from qwen_vl_sft.inference.engine.engine import Engine
from qwen_vl_sft.inference.engine.features import FeatureMemory
from qwen_vl_sft.inference.generation import decode_answer
from qwen_vl_sft.inference.models import (
    answer_with_adapters,
    attach_adapter,
    changes_tower,
    load_arm,
    load_run_processor,
    make_encoder,
)
from qwen_vl_sft.inference.source import Source, check_one_base
from qwen_vl_sft.inference.trained_base import check_trained_base
from qwen_vl_sft.modeling.base_model import set_pixel_limits

# Stands for the bytes of a character whose last token is still to come.
UNFINISHED_CHARACTER = "\ufffd"
# Memory for the features of images that were asked about last, so that the next arm does not compute them again.
FEATURE_BYTES = 2**28
# How long an iterator that is left behind waits for the token that is being generated.
STOPPING_SECONDS = 5


@dataclass(frozen=True)
class Answer:
    """An answer so far.

    `tokens` counts what was generated, the end of the turn too; `seconds` run from when the models were free for it, with
    the reading of the images; `first_seconds` is their count at the first token.
    """

    text: str
    tokens: int
    first_seconds: float
    seconds: float
    finished: bool


def ask(question: str, images: Sequence[ImageFile]) -> Conversation:
    """Build a conversation of one question after its images, as in ChartQA's rows."""
    if not question.strip():
        raise UserError("the question is empty; write one")
    content = [*({"type": image.kind} for image in images), {"type": "text", "text": question}]
    return Conversation([{"role": "user", "content": content}], list(images))


def read_images(paths: Sequence[str | Path]) -> list[ImageFile]:
    """Read image files into memory, and prove them readable. Raises `UserError` with every file that is not."""
    images, problems = [], []
    for path in paths:
        if str(path).startswith(("http://", "https://")):
            problems.append(f"{path} is an address on the web; download it and name the file")
            continue
        if Path(path).is_dir():
            problems.append(f"{path} is a folder; name image files in it")
            continue
        try:
            images.append(read_image(path, str(path)))
        except UserError as error:
            problems += error.problems
    raise_all(problems)
    return images


def read_image(path: str | Path, name: str) -> ImageFile:
    """Read one image file into memory, and prove it readable; messages call it `name`. Raises `UserError`."""
    try:
        image = ImageFile(Path(path).read_bytes(), name)
        image.decode()
    except OSError as error:
        raise UserError(f"image {name} cannot be read: {error.strerror}") from None
    except BadRow as error:
        raise UserError(f"{error}; give a PNG, JPEG, WebP or the like") from None
    return image


class Answerer:
    """A base model with the adapters of runs on it, or full models beside it; one conversation is answered at a time.

    `sources` are runs, or a base model alone; they are named by their places. Any thread may ask.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        check_one_base(sources)
        self.sources = list(sources)
        self.processors = [load_run_processor(source) for source in sources]
        self._context = read_context(any(bool(source.recipe.get("use_cpu")) for source in sources))
        self._base: Any = None
        self._full: dict[int, Any] = {}
        self._lock = threading.Lock()
        # Of the vision tower and pixel limits that answered last, which the next arm mostly shares.
        self._seen: tuple[Any, FeatureMemory] = (None, FeatureMemory(0))

    def load(self, arms: Collection[str]) -> None:
        """Load what the arms need. Raises `UserError`."""
        tuned = {
            run_index: source.tuned for run_index, source in enumerate(self.sources) if source.tuned and "tuned" in arms
        }
        adapters = {run_index: model.folder for run_index, model in tuned.items() if model.is_adapter}
        for run_index in adapters:
            check_trained_base(self.sources[run_index])
        with reported_memory():
            if adapters or set(arms) & {"base", "prompted"}:
                self._base = load_arm(self.sources[0], "base", None, self._context)
            for run_index, folder in adapters.items():
                self._base = attach_adapter(self._base, folder, _adapter_name(run_index))
            if adapters:
                answer_with_adapters(self._base, self.sources[0].recipe.model)
            for run_index in tuned.keys() - adapters.keys():
                self._full[run_index] = load_arm(self.sources[run_index], "tuned", None, self._context)
        for model in (self._base, *self._full.values()):
            if model is not None:
                model.eval()

    def encoder(
        self, arm: str, run_index: int = 0, system_message: str | None = None, max_pixels: int | None = None
    ) -> Encoder:
        """Build an arm's encoder; a given system message or pixel limit wins over the run's."""
        processor = self.processors[run_index]
        if max_pixels is not None:
            processor = copy.copy(processor)
            processor.image_processor = copy.copy(processor.image_processor)
            set_pixel_limits(processor, None, max_pixels)
        message = self.sources[run_index].system_message if system_message is None else system_message
        return make_encoder(self.sources[run_index], arm, processor, message or "")

    def check(self, conversation: Conversation, encoder: Encoder) -> None:
        """Raise `UserError` for a conversation that cannot be asked; needs no model."""
        with _as_request():
            encoder.encode_prompt(conversation)

    def stream(
        self, conversation: Conversation, arm: str, encoder: Encoder, max_new_tokens: int, run_index: int = 0
    ) -> Iterator[Answer]:
        """Answer token by token; the last answer is the finished one. Raises `UserError`.

        Whoever stops iterating stops the generation too, at its next token.
        """
        listener = _Listener(encoder)

        def answer() -> None:
            # The thread that generates holds the lock: an iterator that is left behind must not keep it.
            try:
                with self._lock, self._weights(arm, run_index) as model, reported_memory(), _as_request():
                    listener.begin()
                    memory = self._memory(arm, run_index, model, encoder)
                    row = encoder.encode_prompt(conversation, memory.reading(encoder.read_media))
                    slots = len(row.input_ids) + max_new_tokens
                    engine = Engine(model, encoder, max_new_tokens, rows=1, slots=slots, memory=memory)
                    with contextlib.closing(engine.steps(lambda number, read: row, [[0]])) as steps:
                        for [answering] in steps:
                            listener.hear(answering.tokens)
                            if listener.abandoned.is_set():
                                return
                    listener.finish(engine.answer_of(answering).text)
            except BaseException as error:
                listener.received.put(error)

        worker = threading.Thread(target=answer, daemon=True)
        worker.start()
        try:
            while True:
                answer_so_far = listener.received.get()
                if isinstance(answer_so_far, BaseException):
                    raise answer_so_far
                yield answer_so_far
                if answer_so_far.finished:
                    return
        finally:
            listener.abandoned.set()
            # Python must not end in the middle of the model's last step.
            worker.join(timeout=STOPPING_SECONDS)

    def _memory(self, arm: str, run_index: int, model: Any, encoder: Encoder) -> FeatureMemory:
        """Return the features known of the tower that an arm has, at the pixel limits of its encoder."""
        own = arm == "tuned" and (run_index in self._full or changes_tower(model))
        size = encoder.processor.image_processor.size
        key = (run_index if own else None, size["shortest_edge"], size["longest_edge"])
        if self._seen[0] != key:
            self._seen = (key, FeatureMemory(FEATURE_BYTES, most_bytes_on_gpu=FEATURE_BYTES))
        return self._seen[1]

    @contextlib.contextmanager
    def _weights(self, arm: str, run_index: int) -> Iterator[Any]:
        if arm == "tuned" and run_index in self._full:
            yield self._full[run_index]
        elif arm == "tuned":
            self._base.set_adapter(_adapter_name(run_index))
            yield self._base
        elif isinstance(self._base, PeftModel):
            with self._base.disable_adapter():
                yield self._base
        else:
            yield self._base


class _Listener:
    """Turns generated tokens into answers, for an iterator in another thread that may be left behind (`abandoned`)."""

    def __init__(self, encoder: Encoder) -> None:
        self.received: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        self.abandoned = threading.Event()
        self._encoder = encoder
        self._count = 0
        self._began = self._first = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def hear(self, tokens: Sequence[int]) -> None:
        """Tell the answer so far; all of its tokens are given each time."""
        if not self._count:
            self._first = time.perf_counter() - self._began
        self._count = len(tokens)
        self._say(decode_answer(self._encoder, tokens).rstrip(UNFINISHED_CHARACTER), finished=False)

    def finish(self, text: str) -> None:
        """Tell the whole answer, decoded as in an evaluation."""
        self._say(text, finished=True)

    def _say(self, text: str, finished: bool) -> None:
        seconds = time.perf_counter() - self._began
        self.received.put(Answer(text, self._count, self._first, seconds, finished))


@contextlib.contextmanager
def reported_memory() -> Iterator[None]:
    """Turn too little GPU memory into a `UserError` with the ways out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory does not suffice; reduce the images with --max_pixels, ask about fewer of them, or load the"
            f" model with --load_in_4bit ({first_line(error)})"
        ) from error


@contextlib.contextmanager
def _as_request() -> Iterator[None]:
    """Word a `BadRow` for a request, which belongs to no row."""
    try:
        yield
    except BadRow as error:
        raise UserError(f"the request {error}; take it out") from None


def _adapter_name(run_index: int) -> str:
    # PEFT looks for an adapter's name inside the names of weights, so none may be part of another, nor of a layer's.
    return f"run{run_index:04d}"
