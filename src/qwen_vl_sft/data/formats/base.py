"""The interface of a data format: how its rows are recognised, read and asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_sft.data.boxes import BoxCoordinates, read_boxes
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.media import MEDIA
from qwen_vl_sft.errors import BadRow

Row = Mapping[str, Any]
# Media that other trainers read. A model that never saw them would learn to guess.
_OTHER_MEDIA = ("video", "audio")
# Columns that tell where a row comes from.
BOOKKEEPING = frozenset({"id", "row_id", "source", "split", "human_or_machine"})


def last_answer(row: Row, conversation: Conversation) -> list[str]:
    """Accept the last answer of the conversation alone."""
    return [conversation.last_answer]


@dataclass(frozen=True)
class DataFormat:
    """A form of rows, declared by a module of this package as `FORMAT`.

    Attributes:
        name: its name as `dataset_format`.
        help: the columns it reads, for the recipe's help.
        columns: the columns a dataset must have.
        parse: makes a conversation of a row whose paths are relative to a folder. Raises `BadRow`.
        priority: which of several formats that fit reads a dataset: the one with the lowest number.
        optional: columns that are read when they are there.
        ignored: columns that mean nothing for training, and may be there.
        refused: columns that must be empty, each with the message of the `BadRow`; those of unread media are always.
        accepted_answers: the answers that an evaluation accepts, from a row and its conversation up to the last answer.
        system_message: put before rows of this format unless the recipe says otherwise.
        most_images: most images of a row, None for any number.
        subject: what models trained on it are for, for the model card.
        known_datasets: parts of the names of datasets that have this form.
        box_coordinates: coordinates of boxes in the rows, as the recipe tells; see `read_boxes`.
    """

    name: str
    help: str
    columns: frozenset[str]
    parse: Callable[[Row, Path | None], Conversation]
    priority: int
    optional: frozenset[str] = frozenset()
    ignored: frozenset[str] = BOOKKEEPING
    refused: Mapping[str, str] = field(default_factory=dict)
    accepted_answers: Callable[[Row, Conversation], list[str]] = last_answer
    system_message: str | None = None
    most_images: int | None = None
    subject: str | None = None
    known_datasets: tuple[str, ...] = ()
    box_coordinates: BoxCoordinates | None = None

    def recognises(self, columns: Set[str]) -> bool:
        """Return whether a dataset has this form, by its columns."""
        return self.columns <= columns

    def read(self, row: Row, folder: Path | None) -> Conversation:
        """Return a row as a conversation; paths in it are relative to `folder`. Raises `BadRow`."""
        for name, message in self.refused.items():
            if has_value(row.get(name)):
                raise BadRow(message)
        for kind in unread_media():
            for name in (kind, f"{kind}s"):
                if has_value(row.get(name)):
                    raise BadRow(f"has something in column {name}, and only images are read; leave such rows out")
        objects = row.get("objects") if "objects" in self.optional else None
        return read_boxes(self.parse(row, folder), objects, self.box_coordinates)

    def resolve_system_message(self, stated: str | None) -> str | None:
        """Return the system message of a recipe: the one stated, else the format's own; an empty one is none."""
        return (self.system_message if stated is None else stated) or None


def unread_media() -> list[str]:
    """List the kinds of media that rows may have but no medium reads."""
    return [kind for kind in _OTHER_MEDIA if kind not in MEDIA]


def has_value(value: Any) -> bool:
    """Return whether the value is not empty (Arrow stores missing values as null)."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(has_value(entry) for entry in value) if isinstance(value, list) else value is not None and value != ""
