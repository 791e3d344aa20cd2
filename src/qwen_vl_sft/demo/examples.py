"""Examples on the page: rows of the run's evaluation data with their right answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft import tiny
from qwen_vl_sft.config.settings import DataSettings
from qwen_vl_sft.data.boxes import has_boxes
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.dataset import Rows, open_split, select_evenly
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.task import read_question
from qwen_vl_sft.inference.source import Source

FILE = "examples.json"
# Rows of several turns cannot be asked on the page, so more rows are looked at than shown.
LOOKED_AT = 8
TRIED_SPLITS = ("test", "validation", "val")


@dataclass(frozen=True)
class Example:
    """A question about image files, and its right answer."""

    images: tuple[Path, ...]
    question: str
    gold: str


def collect_examples(source: Source, number: int, folder: Path) -> list[Example]:
    """Collect rows of the run's evaluation split, else of the charts that ship with this package; images go into `folder`."""
    data = source.recipe.data
    splits = list(dict.fromkeys(split for split in (data.dataset_test_split, *TRIED_SPLITS) if split))
    wanted = [(DataSettings(dataset_name=str(tiny.DATA_DIR)), "test")]
    if data.dataset_name:
        wanted = [*((data, split) for split in splits), *wanted]
    for settings, split in wanted if number else ():
        try:
            # A Hub dataset is read from its beginning: a few rows are no reason to download it whole.
            streamed = not Path(str(settings.dataset_name)).exists()
            most = number * LOOKED_AT
            rows = open_split(settings, split, streamed, max_rows=most if streamed else None)
            found = list(_write(rows if streamed else select_evenly(rows, most), number, folder))
        except UserError:
            continue
        if found:
            return found
    return []


def save_examples(examples: Sequence[Example], folder: Path) -> None:
    """Write the list of examples into `folder`, where their images are already."""
    listed = [
        {"images": [path.name for path in example.images], "question": example.question, "gold": example.gold}
        for example in examples
    ]
    (folder / FILE).write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_examples(folder: Path) -> list[Example]:
    """Load the examples that `save_examples` wrote."""
    listed = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return [
        Example(tuple(folder / name for name in entry["images"]), entry["question"], entry["gold"]) for entry in listed
    ]


def _write(rows: Rows, number: int, folder: Path) -> Iterator[Example]:
    """Yield evenly spread rows, so that not all come from one half of the split."""
    found = []
    for raw in rows.dataset:
        conversation = rows.conversation(raw).up_to_last_answer()
        if _is_plain(conversation):
            found.append((conversation, read_question(raw, conversation, rows.format)))
    step = max(1, len(found) // number)
    folder.mkdir(parents=True, exist_ok=True)
    for index, (conversation, question) in enumerate(found[::step][:number]):
        paths = []
        for count, image in enumerate(conversation.media):
            kind = (image.open().format or "png").lower()
            path = folder / f"example-{index + 1}{'-' + str(count + 1) if count else ''}.{kind}"
            # The file's own bytes: another encoding could change the answer.
            path.write_bytes(image.read())
            paths.append(path)
        yield Example(tuple(paths), question.question, " or ".join(question.answers))


def _is_plain(conversation: Conversation) -> bool:
    """Return whether the page could ask it: images, then one text, then the answer.

    Boxes would stand in other coordinates than those that the model writes on the page.
    """
    first, *others = conversation.messages
    kinds = [part["type"] for part in first["content"]]
    plain = kinds == ["image"] * len(conversation.media) + ["text"]
    is_single = first["role"] == "user" and len(others) == 1 and "tool_calls" not in others[0]
    is_plain = plain and is_single and not conversation.tools and not has_boxes(conversation)
    return bool(conversation.media) and is_plain
