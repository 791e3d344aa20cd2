"""The source of a split: finding it on the Hub or among local files, loading it, and the reason when that fails."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Audio, Image, IterableDataset, List, Video
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from qwen_vl_sft.errors import UserError, first_line

_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# A file that holds one split says so by its name, also when it is numbered as on the Hub.
_NAMED_SPLIT = re.compile(r"(train|test|val|validation)(-\d+-of-\d+)?")


@dataclass(frozen=True)
class SplitSource:
    """A split, with its slice, and the `arguments` of `load_dataset` that find it."""

    name: str
    split: str
    arguments: dict[str, Any]

    def load(self) -> Any:
        """Load the split as a map-style dataset, undecoded. Raises `UserError`."""
        try:
            dataset = _undecoded(datasets.load_dataset(**self.arguments, split=self.split))
            # Arrow does not check that text is UTF-8; Python would fail later, when the row is read.
            dataset.data.validate(full=True)
        except Exception as error:
            raise self.refusal(error) from error
        return dataset

    def stream(self) -> Any:
        """Open the split as a stream, undecoded, to be read by `rows_of`. Raises `UserError`."""
        try:
            return _undecoded(datasets.load_dataset(**self.arguments, split=self.split, streaming=True))
        except Exception as error:
            raise self.refusal(error) from error

    def rows_of(self, stream: IterableDataset) -> Iterator[dict[str, Any]]:
        """Yield the rows of a stream. Raises `UserError` where its files cannot be read any further."""
        try:
            # Read in batches, a stream does not ask which worker it is in.
            for batch in stream.iter(batch_size=1):
                yield {name: values[0] for name, values in batch.items()}
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise self.refusal(error) from error

    def refusal(self, error: BaseException) -> UserError:
        """Turn an error of `datasets`, which raises a dozen kinds for a wrong name, split or file, into one for the user."""
        return UserError(f"dataset {self.name}, split {self.split}: cannot be loaded: {self._reason(error)}")

    def _reason(self, error: BaseException) -> str:
        while isinstance(error, DatasetGenerationError) and error.__cause__:  # which says only that there was one
            error = error.__cause__
        if self.arguments["path"] == "json" and not isinstance(error, OSError):
            for file in map(Path, self.arguments.get("data_files", {}).values()):  # none: a Hub id of this name
                if problem := _problem_of_json(file):
                    return f"{file.name} {problem}"
        return f"in its files {error.details()}" if isinstance(error, CastError) else first_line(error)


def find_source(name: str, split: str, config: str | None) -> SplitSource:
    """Find the split of a Hub dataset, a local folder or a local file. Raises `UserError`."""
    path = Path(name).expanduser()
    if path.exists():
        return SplitSource(name, split, {"name": config, **_local_arguments(path, split.split("[")[0])})
    if name.startswith((".", "/", "~")) or path.suffix in _KINDS:
        raise UserError(f"dataset_name: {name} does not exist here; give a local folder or file, or a Hub id")
    return SplitSource(name, split, {"name": config, "path": name})


def _local_arguments(path: Path, split: str) -> dict[str, Any]:
    """Return the arguments of `load_dataset` for a local path.

    By default it reads a folder of JSONL and images as images only.
    """
    if path.is_file():
        kind = _KINDS.get(path.suffix)
        if kind is None:
            raise UserError(f"dataset_name: {path} is none of .jsonl, .json, .parquet, nor a folder")
        named = _NAMED_SPLIT.fullmatch(path.stem)
        own = named[1] if named else "train"
        if split != own:
            # Under another name, training rows would silently be used for evaluation.
            raise UserError(
                f"dataset {path}: has no split {split!r}: a file is one split, this one {own!r}; name it, take slices"
                f" of it such as {own}[:90%] and {own}[90%:], or give a folder of one file per split"
            )
        return {"path": kind, "data_files": {own: str(path)}}
    files = sorted(file for file in path.iterdir() if _KINDS.get(file.suffix) == "json" and file.stem != "metadata")
    if files and not any(path.rglob("*.parquet")):
        own_files = [file for file in files if file.stem == split]
        if not own_files:
            splits = dict.fromkeys(file.stem for file in files)
            raise UserError(f"dataset {path}: has no split {split!r}; its files give {', '.join(splits)}")
        if len(own_files) > 1:
            both = " and ".join(file.name for file in own_files)
            raise UserError(f"dataset {path}: split {split!r} has two files, {both}; keep one, or name one of them")
        # Only this file: all named files would be read, and their columns would have to agree.
        return {"path": "json", "data_files": {split: str(own_files[0])}}
    return {"path": str(path)}


def _problem_of_json(file: Path) -> str | None:
    """Return the fault of a file of JSON, a value a line or one for all, and its place; None for good JSON."""
    with file.open("rb") as raw_lines:
        for number, raw in enumerate(raw_lines, start=1):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                return f"is no UTF-8 text (line {number}, byte {error.start + 1}); save it as UTF-8"
    rows = 0
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                if not rows:
                    return _problem_of_whole(file)
                return f"is no JSON (line {number}, column {error.colno}: {error.msg})"
            if not isinstance(value, dict | list):
                return f"holds no row in line {number}, but {line.strip()[:40]}"
            rows += 1
    return None if rows else "is empty"


def _problem_of_whole(file: Path) -> str | None:
    """Return the fault of a file that holds a single JSON value over several lines."""
    try:
        json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"is no JSON (line {error.lineno}, column {error.colno}: {error.msg})"
    return None


def _undecoded(dataset: Any) -> Any:
    """Keep image columns as bytes and paths, which workers decode; and others' videos and sounds, which nobody reads."""
    for column, feature in (dataset.features or {}).items():
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, Image | Video | Audio):
            kept = type(inner)(decode=False)
            dataset = dataset.cast_column(column, List(kept) if isinstance(feature, List) else kept)
    return dataset
