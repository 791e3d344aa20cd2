"""Rows of ChartQA: one question about one image, with its accepted answers."""

from __future__ import annotations

import re
from pathlib import Path

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.formats.base import DataFormat, Row
from qwen_vl_sft.data.formats.content import check_named_files, check_question, number_as_text, text_or_number
from qwen_vl_sft.data.formats.turns import system_turns
from qwen_vl_sft.data.media import MEDIA
from qwen_vl_sft.errors import BadRow, quoted

CHARTQA_SYSTEM_MESSAGE = (
    "You are a Vision Language Model specialized in interpreting visual data from chart images.\n"
    "Your task is to analyze the provided chart image and respond to queries with concise answers, usually a single"
    " word, number, or short phrase.\n"
    "The charts include a variety of types (e.g., line charts, bar charts) and contain colors, labels, and text.\n"
    "Focus on delivering accurate, succinct answers based on the visual information. Avoid additional explanation"
    " unless absolutely necessary."
)
_IMAGE = MEDIA["image"]
# As a table holds what was a list: it may mean accepted answers, or be one.
_LIST_OF_TEXTS = re.compile(r"""\s*\[\s*(?:'.*'|".*")\s*,?\s*\]\s*""", re.DOTALL)


def parse(row: Row, folder: Path | None) -> Conversation:
    """Read `image`, `query`, `label` (text, or a list whose first entry counts) as one question and answer."""
    if row.get("image") is None:
        raise BadRow("has no image")
    query = text_or_number(row.get("query"), "query")
    if _IMAGE.placeholder in query:
        raise BadRow(f"has {_IMAGE.placeholder} in its query; the image is put before the query, so leave it out")
    check_question(query, has_images=True)
    image = _IMAGE.file(row["image"], folder)
    check_named_files(query, [image.path], folder)
    content = [{"type": _IMAGE.kind}, {"type": "text", "text": query}]
    answer = {"type": "text", "text": accepted_answers(row)[0]}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [answer]}]
    system = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in system_turns(row)]
    return Conversation([*system, *messages], [image])


def accepted_answers(row: Row, _: Conversation | None = None) -> list[str]:
    """Return the accepted answers in `label`, of which the first is learned. Raises `BadRow`."""
    label = row.get("label")
    if isinstance(label, str) and _LIST_OF_TEXTS.fullmatch(label):
        raise BadRow(
            f"has a list written as one text, {quoted(label)[:80]}, in column label; write the list itself (JSON lines or"
            " Parquet), or its first answer alone"
        )
    first, *others = [number_as_text(answer) for answer in label] or [None] if isinstance(label, list) else [label]
    others = [answer for answer in others if answer is not None and str(answer).strip()]
    return [text_or_number(answer, "answer (column label)") for answer in (first, *others)]


FORMAT = DataFormat(
    name="chartqa",
    help="image, query, label",
    columns=frozenset({"image", "query", "label"}),
    parse=parse,
    priority=10,
    optional=frozenset({"system"}),
    refused={
        "images": "has images in column images too, of which this format shows none; see dataset_format: messages",
        "objects": "has something in column objects, which this format does not read; see dataset_format: messages",
    },
    accepted_answers=accepted_answers,
    system_message=CHARTQA_SYSTEM_MESSAGE,
    most_images=1,
    subject="short answers to questions about charts",
    known_datasets=("chartqa",),
)
