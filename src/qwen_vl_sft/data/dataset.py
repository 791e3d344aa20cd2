"""Rows of a split: opening a Hub id, a local folder or file, slices, streams. Images stay undecoded."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError

from qwen_vl_sft import tiny
from qwen_vl_sft.config.settings import DataSettings
from qwen_vl_sft.data import row_files
from qwen_vl_sft.data.boxes import BoxCoordinates
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.formats import AUTO, choose_format
from qwen_vl_sft.data.formats.base import DataFormat
from qwen_vl_sft.data.media import ReadMedia
from qwen_vl_sft.data.source import FileSource, Source, find_source
from qwen_vl_sft.data.undecoded import storable
from qwen_vl_sft.errors import BadRow, UserError, shortened

ROW_ID = "row_id"
# Rows of a stream whose columns tell its format.
_LOOKED_AT = 20
_SLICE = re.compile(r"^(?P<split>[\w.-]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?$")


@dataclass(frozen=True)
class Rows:
    """The rows of one split: undecoded, in a known format, with a name for messages.

    `dataset` is a map-style `Dataset`, or an `IterableDataset` when streamed. Every row carries `row_id`, its place in
    the split before any shuffling; in a shuffled stream of several files its place in the order they are mixed in.
    `ignored_columns` mean nothing to the format. `commit` is that of text files on the Hub.
    """

    dataset: Dataset | IterableDataset
    format: DataFormat
    name: str
    folder: Path | None
    ignored_columns: tuple[str, ...] = ()
    commit: str | None = None

    @property
    def streamed(self) -> bool:
        """Return whether rows are read in sequence and cannot be looked up."""
        return isinstance(self.dataset, IterableDataset)

    @property
    def title(self) -> str:
        """Return the name for what is shown often: `builtin:NAME` in place of a folder of this package."""
        source, mark, split = self.name.rpartition(" [")
        return f"{tiny.builtin_name(source) or source}{mark}{split}"

    def __len__(self) -> int:
        assert isinstance(self.dataset, Dataset)
        return len(self.dataset)

    def conversation(self, item: Mapping[str, Any]) -> Conversation:
        """Return the conversation of an item, `{"row": index}` or a raw row. Raises `BadRow` that names the row."""
        with self.opened(item) as (conversation, _):
            return conversation

    def encode(self, item: Mapping[str, Any], encoder: Encoder, read_media: ReadMedia | None = None) -> Encoded:
        """Encode an item, its images as `read_media` or else the encoder reads them. Raises `BadRow` that names the row."""
        with self.opened(item) as (conversation, row_id):
            return replace(encoder.encode(conversation, read_media), row_id=row_id)

    @contextlib.contextmanager
    def opened(self, item: Mapping[str, Any]) -> Iterator[tuple[Conversation, int]]:
        """Yield the conversation of an item and its row id; name the row in a `BadRow` that is raised inside."""
        # A raw row may have a column of this name too.
        raw = self.dataset[item["row"]] if set(item) == {"row"} else item  # type: ignore[index]
        row_id = int(raw[ROW_ID])
        try:
            yield self.format.read(raw, self.folder), row_id
        except BadRow as error:
            raise type(error)(f"{self.name_of(row_id)} {error}") from None

    def select(self, indices: list[int]) -> Rows:
        """Return the rows at `indices` alone, in that order."""
        assert isinstance(self.dataset, Dataset)
        dataset = self.dataset.select(indices)
        return Rows(dataset, self.format, self.name, self.folder, self.ignored_columns, self.commit)

    def name_of(self, row_id: int) -> str:
        """Return the name of a row for messages."""
        return f"{self.title}, row {row_id}"


def open_rows(
    name: str,
    split: str,
    config: str | None = None,
    streaming: bool = False,
    row_format: str = AUTO,
    shuffle_seed: int | None = None,
    max_rows: int | None = None,
    box_coordinates: BoxCoordinates | None = None,
    ignored_columns: Sequence[str] = (),
    image_folder: str | None = None,
    revision: str | None = None,
) -> Rows:
    """Open one split of a dataset.

    Args:
        name: Hub id, local folder (parquet in the Hub's layout, JSONL, CSV, images with metadata, or of `save_to_disk`),
            or local file.
        split: its name, with an optional slice: `train[:10%]`, `train[100:200]`.
        config: the Hub dataset's configuration.
        streaming: read row by row instead of preparing the whole split first.
        row_format: name of a format (`formats.FORMATS`), or "auto" to tell by the columns.
        shuffle_seed: shuffle with this seed, before the cap; None keeps the order.
        max_rows: most rows to take, None for all.
        box_coordinates: coordinates of boxes in the rows; see `read_boxes`.
        ignored_columns: columns that are left unread, beside those that the format ignores anyway.
        image_folder: folder that image paths in rows are relative to, by default that of the dataset.
        revision: branch, tag or commit of a Hub dataset.

    Raises `UserError` when the dataset, the split or the format is not there.
    """
    folder = _image_folder(name, image_folder)
    stated = folder if image_folder else None
    if streaming:
        source, dataset = _stream(name, split, config, shuffle_seed, stated, revision)
    else:
        source = find_source(name, split, config, stated, revision)
        dataset = _load(source, f"dataset {name}, split {split}")
    if folder is None and isinstance(source, FileSource):
        folder = source.fetch_images(dataset)
    where = f"{name} [{split}]"
    if not streaming and shuffle_seed is not None:
        dataset = dataset.shuffle(seed=shuffle_seed)
    if max_rows is not None:
        dataset = dataset.take(max_rows)
    columns = _columns_of(dataset) - {ROW_ID}
    if not columns:
        raise UserError(f"{where}: holds no rows")
    found = choose_format(columns, row_format, where).ignoring(ignored_columns)
    if box_coordinates is not None:
        found = replace(found, box_coordinates=box_coordinates)
    commit = source.hub.commit if isinstance(source, FileSource) and source.hub else None
    return Rows(dataset, found, where, folder, tuple(found.unread(columns)), commit)


def open_split(
    data: DataSettings,
    split: str,
    streaming: bool | None = None,
    shuffle_seed: int | None = None,
    max_rows: int | None = None,
) -> Rows:
    """Open one split of a recipe's data, streamed if the recipe says so or else as stated; see `open_rows`."""
    return open_rows(
        str(data.dataset_name),
        split,
        data.dataset_config,
        data.dataset_streaming if streaming is None else streaming,
        data.dataset_format,
        shuffle_seed=shuffle_seed,
        max_rows=max_rows,
        box_coordinates=data.box_coordinates,
        ignored_columns=data.ignored_columns or (),
        image_folder=data.image_folder,
        revision=data.dataset_revision,
    )


def select_evenly(rows: Rows, max_rows: int | None) -> Rows:
    """Return at most `max_rows` rows, evenly spaced: ChartQA's first half is all human questions, its second all machine."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    return rows.select(even_indices(len(rows), max_rows))


def even_indices(total: int, most: int | None) -> list[int]:
    """Return at most `most` of `total` indices, evenly spaced; all of them for None."""
    count = min(most or total, total)
    return [number * total // count for number in range(count)]


def in_memory(rows: Rows) -> Rows:
    """Return the rows of a stream as a map-style dataset, for evaluation; bounded by the cap they were opened with."""
    assert isinstance(rows.dataset, IterableDataset)

    stream, features = rows.dataset, rows.dataset.features

    def read() -> Iterator[dict[str, Any]]:
        yield from (storable(row, features) for row in stream)

    try:
        dataset = _in_memory(iter(stream)) if features is None else Dataset.from_generator(read, features=features)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return replace(rows, dataset=dataset)


def _in_memory(rows: Iterator[dict[str, Any]]) -> Dataset:
    """Return rows of any columns and types."""
    found = list(rows)
    others = [{name: value for name, value in row.items() if name != ROW_ID} for row in found]
    try:
        texts = row_files.in_dataset(others)
    except TypeError:  # a stream of the Hub may hold times and bytes
        return Dataset.from_list(found)
    return texts.add_column(ROW_ID, [row[ROW_ID] for row in found]).with_transform(row_files.parse_texts)


def _image_folder(name: str, stated: str | None) -> Path | None:
    """Return the folder that paths in rows are relative to, None for a Hub dataset. Raises `UserError`."""
    if stated:
        folder = Path(stated).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(
                f"image_folder: {shortened(stated)} is no folder here; give the folder that holds the images"
            )
        return folder
    path = Path(name).expanduser()
    return (path if path.is_dir() else path.parent) if path.exists() else None


def _load(source: Source, where: str) -> Dataset:
    dataset = source.load()
    if len(dataset) == 0:
        raise UserError(f"{where}: holds no rows")
    return _numbered(dataset)


def _numbered(dataset: Dataset) -> Dataset:
    """Give rows their ids, and parse those that are texts when they are asked for."""
    # No format reads a column of this name in the data.
    others = dataset.remove_columns(ROW_ID) if ROW_ID in dataset.column_names else dataset
    numbered = others.add_column(ROW_ID, range(len(others)))
    return numbered.with_transform(row_files.parse_texts) if row_files.TEXT in numbered.column_names else numbered


def _stream(
    name: str, split: str, config: str | None, shuffle_seed: int | None, image_folder: Path | None, revision: str | None
) -> tuple[Source, IterableDataset]:
    base, start, stop = split, 0, None
    if "[" in split:
        match = _SLICE.match(split)
        if not match:
            raise UserError(f"dataset split {split!r}: a streamed dataset takes row slices only, such as train[:1000]")
        base, start, stop = match["split"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    source = find_source(name, base, config, image_folder, revision)
    dataset = source.stream()

    if shuffle_seed is not None and dataset.num_shards > 1 and "[" not in split:
        # Files are also mixed with each other, which leaves no row its place.
        return source, _with_row_ids(source.in_one_shard(dataset.shuffle(seed=shuffle_seed)))
    stream = _with_row_ids(source.in_one_shard(dataset))
    stream = stream.skip(start) if start else stream
    stream = stream.take(stop - start) if stop is not None else stream
    return source, stream if shuffle_seed is None else stream.shuffle(seed=shuffle_seed)


def _with_row_ids(stream: IterableDataset) -> IterableDataset:
    # Without its features, a mapped stream would decode images again.
    features = Features({**stream.features, ROW_ID: Value("int64")}) if stream.features else None
    return stream.map(_with_row_id, with_indices=True, features=features)


def _with_row_id(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, ROW_ID: index}


def _columns_of(dataset: Any) -> set[str]:
    if isinstance(dataset, Dataset) and row_files.TEXT in dataset.column_names:
        return row_files.columns_of(dataset)
    # In a stream of texts each row has its own.
    return set(dataset.column_names or itertools.chain.from_iterable(itertools.islice(dataset, _LOOKED_AT)))
