"""Rows of text files (JSON, JSON lines, CSV, TSV): each is read by itself and kept as the text of a JSON object.

So a row means what it says whatever its neighbours hold, and no value is changed before a format reads it.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets.packaged_modules.generator.generator import Generator

from qwen_vl_sft.data import git_lfs, json_stream
from qwen_vl_sft.data.media import archives
from qwen_vl_sft.data.media.image_file import IMAGE_SUFFIXES
from qwen_vl_sft.errors import quoted, shortened

_KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv"}
_OPENERS: Mapping[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Columns of a prepared dataset: the text of a row, and the names of its columns as a JSON list.
TEXT, COLUMNS = "__json_text__", "__json_columns__"
_FEATURES = Features({TEXT: Value("large_string"), COLUMNS: Value("string")})
# The text of a name in JSON.
_IMAGE_NAME = re.compile(rf'"((?:[^"\\]|\\.)*(?:{"|".join(map(re.escape, IMAGE_SUFFIXES))}))"', re.IGNORECASE)
# What other programs write between the values of tables.
_OTHER_SEPARATORS = re.compile("[;|\t,]")
# Raise it when files are read otherwise than before: prepared rows are then read anew.
_VERSION = 2


def kind_of(file: Path) -> str | None:
    """Return "json" or "csv" for a file of text rows, compressed or not, by its name; None for another file."""
    return _KINDS.get(Path(file.name.lower().removesuffix(_compression_of(file))).suffix)


def stem_of(file: Path) -> str:
    """Return the name of a file of text rows without its suffixes."""
    return Path(file.name[: len(file.name) - len(_compression_of(file))]).stem


def is_packed_otherwise(file: Path) -> bool:
    """Return whether a file of text rows is compressed in a way that is not read, by its name."""
    return kind_of(file) is None and any(f".{suffix}" in _KINDS for suffix in file.name.lower().split(".")[1:-1])


@dataclass(frozen=True)
class RowFiles:
    """The files that hold a split's rows.

    Attributes:
        files: absolute paths, in the rows' order.
        name_images: whether they are tables beside images (`metadata.csv`): their columns `file_name` name images
            relative to the table.
        image_folder: folder that images are relative to instead.
        left_out: images, as absolute paths, whose rows belong to another split.
        separator: what stands between the values of tables; default: a comma, or a tab in TSV.
        classes: names of the numbers in a column, as a list; nested as the column is: `{"list": names}` for a list of
            them, `{"fields": {field: names}}` for an object.
    """

    files: tuple[Path, ...]
    name_images: bool = False
    image_folder: Path | None = None
    left_out: frozenset[str] = frozenset()
    separator: str | None = None
    classes: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self) -> Dataset:
        """Return the rows as a memory-mapped dataset of texts, cached by the files' names, sizes and times.

        Its fingerprint follows from those too. Raises `ValueError` that names the file, and the place in it.
        """
        stats = [archives.file_on_disk(file).stat() for file in self.files]
        arguments = {
            "source": replace(self, left_out=frozenset()),
            "left_out": tuple(sorted(self.left_out)),
            "stamps": tuple((stat.st_size, stat.st_mtime_ns) for stat in stats),
            "version": _VERSION,
        }
        builder = Generator(features=_FEATURES, generator=_entries, gen_kwargs=arguments, split="train")
        builder.download_and_prepare()
        return builder.as_dataset(split="train")

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows. Raises `ValueError` that names the file, and the place in it."""
        for _, row in self.texts_and_rows():
            yield row

    def texts_and_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each row's text in JSON, and the row. Raises `ValueError` that names the file, and the place in it."""
        for file in self.files:
            for text, row in _read(file, self.separator):
                if self.classes:
                    row = _with_class_names(row, self.classes, file)
                    text = json.dumps(row)
                if not self.name_images:
                    yield text, row
                    continue
                folder = self.image_folder or file.parent
                row, images = _with_images(row, file, folder)
                if not self.left_out or self.left_out.isdisjoint(_found(images, folder)):
                    yield json.dumps(row), row


def in_dataset(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Return rows that a stream of texts has brought as a dataset of texts."""
    found = [_entry(json.dumps(row), row) for row in rows]
    return Dataset.from_list(found, features=_FEATURES)


def columns_of(dataset: Dataset) -> set[str]:
    """Return the names of the columns that rows of a dataset of texts have."""
    # Asked of the dataset itself, a shuffled one would be written to disk first.
    return {name for found in dataset.data.column(COLUMNS).unique().to_pylist() for name in json.loads(found)}


def first_named_image(texts: Iterable[str]) -> str | None:
    """Return the first name of an image file that stands in a text of rows, None where none does."""
    for text in texts:
        for found in _IMAGE_NAME.finditer(text):
            name: str = json.loads(f'"{found[1]}"')
            if "://" not in name and not name.startswith("/"):
                return name
    return None


def texts_that_name_images(dataset: Dataset) -> Iterator[str]:
    """Yield the texts of rows in which the name of an image file may stand."""
    for chunk in dataset.data.column(TEXT).chunks:
        yield from chunk.filter(pc.match_substring_regex(chunk, _IMAGE_NAME.pattern, ignore_case=True)).to_pylist()


def parse_texts(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Turn a batch of texts into rows: the transform of a dataset whose column `row_id` is kept."""
    if TEXT not in batch:
        return batch
    others = {name: values for name, values in batch.items() if name not in (TEXT, COLUMNS)}
    rows = [json.loads(text) for text in batch[TEXT]]
    names = dict.fromkeys(name for row in rows for name in row)
    return {**{name: [row.get(name) for row in rows] for name in names}, **others}


def _entries(source: RowFiles, left_out: tuple[str, ...], stamps: Any, version: int) -> Iterator[dict[str, str]]:
    for text, row in replace(source, left_out=frozenset(left_out)).texts_and_rows():
        yield _entry(text, row)


def _entry(text: str, row: Mapping[str, Any]) -> dict[str, str]:
    return {TEXT: text, COLUMNS: json.dumps(sorted(row))}


def _with_images(row: dict[str, Any], table: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Name columns of files as `datasets` does: `file_name` becomes `image`, `chart_file_name` `chart`; list the files.

    Raises `ValueError` for a row that has a column of that name too.
    """
    named: dict[str, Any] = {}
    images: list[str] = []

    def beside(value: Any) -> Any:
        if isinstance(value, list):
            return [beside(part) for part in value]
        if not isinstance(value, str) or not value:
            return value
        images.append(os.path.normpath(folder / value))
        return str(folder / value)

    for name, value in row.items():
        if name in ("file_name", "file_names"):
            wanted = "image" if name == "file_name" else "images"
        elif name.endswith(("_file_name", "_file_names")):
            wanted = name.rpartition("_file_name")[0]
        else:
            named[name] = value
            continue
        if wanted in row:
            raise ValueError(f"{table.name} has a column {wanted} beside {name}, which names the same; keep one")
        named[wanted] = beside(value)
    return named, images


def _with_class_names(row: dict[str, Any], classes: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Put names in place of numbers of classes. Raises `ValueError` for a number that has no name."""
    try:
        return {name: _named(value, classes[name]) if name in classes else value for name, value in row.items()}
    except ValueError as error:
        raise ValueError(f"{file.name} has {error} among its classes, which README.md names otherwise") from None


def _named(value: Any, classes: Any) -> Any:
    if isinstance(value, list) and isinstance(classes, Mapping) and "list" in classes:
        return [_named(part, classes["list"]) for part in value]
    if isinstance(value, Mapping) and isinstance(classes, Mapping) and "fields" in classes:
        fields = classes["fields"]
        return {name: _named(part, fields[name]) if name in fields else part for name, part in value.items()}
    # As `datasets`: a name stands for itself, and -1 for a class that is not known.
    if value is None or not isinstance(classes, list) or value in classes:
        return value
    number = str(value)
    if number == "-1":
        return None
    if not number.isdecimal() or int(number) >= len(classes):
        raise ValueError(quoted(value))
    return classes[int(number)]


def _found(images: Iterable[str], folder: Path) -> Iterator[str]:
    """Yield images where they lie, which may be in an archive."""
    for image in images:
        path = Path(image)
        # One on the Hub is downloaded later.
        found = [] if path.exists() else archives.find(path, folder)
        yield from map(str, found or [path])


def _read(file: Path, separator: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    is_empty = True
    git_lfs.refuse_pointers([archives.file_on_disk(file)])
    try:
        with _opened(file) as source:
            is_table = kind_of(file) == "csv"
            for found in _csv_rows(file, source, separator) if is_table else _json_rows(file, source):
                is_empty = False
                yield found
    except UnicodeDecodeError:
        raise ValueError(f"{file.name} is no UTF-8 text ({_place_of_other_text(file)}); save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file.name} cannot be decompressed ({error})") from None
    if is_empty:
        raise ValueError(f"{file.name} is empty")


def _compression_of(file: Path) -> str:
    suffix = file.suffix.lower()
    return suffix if suffix in _OPENERS else ""


def _opened(file: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    raw = file.open("rb") if archives.file_on_disk(file) == file else archives.open_member(file)
    opener = _OPENERS.get(_compression_of(file))
    return opener(raw, "rb") if opener else raw


def _csv_rows(file: Path, source: IO[bytes], separator: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a table under its header; every value is the text that is written."""
    # Images as base64 are longer than the limit of 131,072.
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(source, encoding="utf-8-sig", newline="")
    is_tsv = file.name.lower().removesuffix(_compression_of(file)).endswith(".tsv")
    # Strict: a quote that is left open would swallow the lines after it.
    reader = csv.reader(lines, delimiter=separator or ("\t" if is_tsv else ","), strict=True)
    try:
        # Lines without anything are passed, here and below.
        names = next(filter(None, reader), [])
        stated = [name for name in names if name]
        if not separator and len(names) == 1 and (other := _OTHER_SEPARATORS.search(names[0])):
            raise ValueError(
                f"{file.name} has one column, {quoted(names[0])}, whose name holds {other[0]!r}; separate its values with"
                f" {'tabs' if is_tsv else 'commas'}, or state the separator in README.md beside it (configs: sep)"
            )
        if len(set(stated)) < len(stated):
            raise ValueError(f"{file.name} has two columns of one name in its first line; rename one")
        for values in reader:
            if not values:
                continue
            if len(values) != len(names):
                raise ValueError(
                    f"{file.name} has {len(values)} value(s) in line {reader.line_num}, under {len(names)} column"
                    " name(s); put values that hold a separator into quotes"
                )
            row = dict(zip(names, values, strict=True))
            # The index that pandas writes has no name.
            nameless = row.pop("", "")
            if nameless and not nameless.isdigit():
                raise ValueError(f"{file.name} has a column without a name in its first line; name it or remove it")
            yield json.dumps(row), row
    except csv.Error as error:
        raise ValueError(f"{file.name} is no table (line {reader.line_num}: {error})") from None


def _json_rows(file: Path, source: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a list, or one a line, or one after another over several lines."""
    is_first = True
    for number, raw in enumerate(source, start=1):
        # Files that were joined have a mark of their encoding in the middle.
        line = raw.decode("utf-8-sig")
        text = line.strip(json_stream.SPACE)
        if not text:
            continue
        if is_first and (text.startswith("[") or text == "{"):
            break
        is_first = False
        try:
            value = json_stream.loads(text)
        except json_stream.JsonFault as fault:
            column = line.index(text) + fault.position + 1
            raise ValueError(f"{file.name} is no JSON (line {number}, column {column}: {fault})") from None
        yield text, _row(value, text, file, number)
    else:
        return
    with _opened(file) as again:
        values = json_stream.values(io.TextIOWrapper(again, encoding="utf-8-sig", newline="\n"))
        try:
            for text, value, number in values:
                yield text, _row(value, text, file, number)
        except json_stream.JsonFault as fault:
            place = f"line {fault.line}, column {fault.position + 1}"
            raise ValueError(f"{file.name} is no JSON ({place}: {fault})") from None


def _row(value: Any, text: str, file: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds no row in line {line}, but {shortened(text)}")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            alone = "one of \\ud800 to \\udfff alone"
            raise ValueError(f"{file.name} holds half a character in line {line}: {alone}") from None
    return value


def _place_of_other_text(file: Path) -> str:
    with _opened(file) as raw_lines:
        for number, raw in enumerate(raw_lines, start=1):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "at its end"
