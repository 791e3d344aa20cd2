"""The interface of a data format: how its rows are recognised, read and asked about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_vl_sft.data.boxes import BoxCoordinates, read_boxes
from qwen_vl_sft.data.conversation import Conversation, without_thought
from qwen_vl_sft.data.formats.bookkeeping import is_bookkeeping
from qwen_vl_sft.data.media import MEDIA
from qwen_vl_sft.errors import BadRow, UserError, shortened

Row = Mapping[str, Any]
# Media that other trainers read. A model that never saw them would learn to guess.
_OTHER_MEDIA = ("video", "audio")
# Evaluation tells by it which part of a split a row belongs to.
READ_BY_EVALUATION = frozenset({"human_or_machine"})
# Columns that other trainers read, each with the way out.
_OTHERS_READ = {
    "functions": "write them into column tools",
    "chosen": "write that answer as the last turn",
    "history": "write earlier turns as turns",
    "weight": "write it into the turn that it is for",
    "loss": "write it into the turn that it is for",
    "train": "write it into the turn that it is for",
    "image_path": "name the column image",
    "image_paths": "name the column images",
    "image_url": "name the column image",
    "file_name": "name the column image",
    "file_names": "name the column images",
}


def last_answer(row: Row, conversation: Conversation) -> list[str]:
    """Accept the last answer of the conversation alone, without its thought."""
    return [without_thought(conversation.last_answer)]


@dataclass(frozen=True)
class DataFormat:
    """A form of rows, declared by a module of this package as `FORMAT`.

    Attributes:
        name: its name as `dataset_format`.
        help: the columns it reads, for the recipe's help.
        columns: the columns a dataset must have.
        parse: makes a conversation of a row whose paths are relative to a folder. Raises `BadRow`.
        priority: which of several formats that fit reads a dataset: the one with the lowest number.
        optional: columns that are read when they are there; with images those of all media.
        ignored: columns that may be there and are not read; those of `is_bookkeeping` may always.
        refused: columns that must be empty, each with the message of its `BadRow`. So must all columns that the format does
            not name.
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
    ignored: frozenset[str] = frozenset()
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
            if name not in self.ignored and has_value(row.get(name)):
                raise BadRow(message)
        for kind in unread_media():
            for name in (kind, f"{kind}s"):
                if name not in self.ignored and has_value(row.get(name)):
                    raise BadRow(f"has something in column {name}, and only images are read; leave such rows out")
        known = self._read() | self.ignored
        for name, value in row.items():
            if name not in known and not is_bookkeeping(name) and has_value(value):
                way_out = f"{_OTHERS_READ[name]}, or " if name in _OTHERS_READ else ""
                raise BadRow(
                    f"has something in column {shortened(name)}, which is not read; {way_out}if the row means the same"
                    " without it, list it in ignored_columns"
                )
        objects = row.get("objects") if "objects" in self.optional else None
        return read_boxes(self.parse(row, folder), objects, self.box_coordinates)

    def ignoring(self, columns: Collection[str]) -> DataFormat:
        """Return this format with more columns that are not read. Raises `UserError` for those that it reads."""
        if both := sorted({*columns} & self._read()):
            raise UserError(
                f"ignored_columns: {', '.join(both)} is read by the format {self.name}; take it from the list"
            )
        return replace(self, ignored=self.ignored | {*columns}) if columns else self

    def unread(self, columns: Set[str]) -> list[str]:
        """List those columns of a dataset that may hold something and are not read."""
        read = self._read() | self.refused.keys()
        return sorted(name for name in columns - read if name in self.ignored or is_bookkeeping(name))

    def _read(self) -> frozenset[str]:
        media = {name for kind in MEDIA for name in (kind, f"{kind}s")} if "images" in self.optional else set()
        return self.columns | self.optional | media | READ_BY_EVALUATION

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
