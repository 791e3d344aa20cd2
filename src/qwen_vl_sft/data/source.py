"""The source of a split: finding it on the Hub or among local files, loading it, and the reason when that fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, Video
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from qwen_vl_sft.data import local_files, row_files
from qwen_vl_sft.data.formats.base import READ_BY_EVALUATION
from qwen_vl_sft.data.formats.bookkeeping import is_bookkeeping
from qwen_vl_sft.data.row_files import RowFiles
from qwen_vl_sft.errors import UserError, first_line


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
        """Open the split as a stream, undecoded, to be read by `in_one_shard`. Raises `UserError`."""
        try:
            return _undecoded(datasets.load_dataset(**self.arguments, split=self.split, streaming=True))
        except Exception as error:
            raise self.refusal(error) from error

    def in_one_shard(self, stream: IterableDataset) -> IterableDataset:
        """Return a stream that a data loader cannot deal out to its workers by files: each would count and cut a part."""
        return IterableDataset.from_generator(self._read, features=stream.features, gen_kwargs={"stream": stream})

    def refusal(self, error: BaseException) -> UserError:
        """Turn an error of `datasets`, which raises a dozen kinds for a wrong name, split or file, into one for the user."""
        return _refusal(self.name, self.split, error)

    def _read(self, stream: IterableDataset) -> Iterator[dict[str, Any]]:
        """Yield the rows of a stream. Raises `UserError` where its files cannot be read any further."""
        try:
            # Read in batches, a stream does not ask which worker it is in.
            for batch in stream.iter(batch_size=1):
                yield {name: values[0] for name, values in batch.items()}
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise self.refusal(error) from error


@dataclass(frozen=True)
class FileSource:
    """A split, with its slice, that lies in local text files: JSON, JSON lines, CSV or TSV."""

    name: str
    split: str
    files: RowFiles

    def load(self) -> Any:
        """Load the split as a map-style dataset of texts, see `row_files.parse_texts`. Raises `UserError`."""
        try:
            return _sliced(self.files.prepare(), self.split)
        except Exception as error:
            raise self.refusal(error) from error

    def stream(self) -> IterableDataset:
        """Open the split as a stream of rows. Raises `UserError` where its files cannot be read any further."""
        return IterableDataset.from_generator(self._read)

    def in_one_shard(self, stream: IterableDataset) -> IterableDataset:
        """Return the stream: it is one already."""
        return stream

    def refusal(self, error: BaseException) -> UserError:
        """Turn an error of reading the files into one for the user."""
        return _refusal(self.name, self.split, error)

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.files.read()
        except (ValueError, OSError) as error:
            raise self.refusal(error) from error


@dataclass(frozen=True)
class DiskSource:
    """A split, with its slice, of a folder that `save_to_disk` has written."""

    name: str
    split: str
    folder: Path

    def load(self) -> Any:
        """Load the split as a map-style dataset, undecoded. Raises `UserError`."""
        try:
            dataset = datasets.load_from_disk(str(self.folder))
            dataset.data.validate(full=True)
            return _sliced(_undecoded(dataset), self.split)
        except Exception as error:
            raise _refusal(self.name, self.split, error) from error

    def stream(self) -> IterableDataset:
        """Open the split as a stream, undecoded. Raises `UserError`."""
        return self.load().to_iterable_dataset()

    def in_one_shard(self, stream: IterableDataset) -> IterableDataset:
        """Return the stream: it is one already."""
        return stream


Source = SplitSource | FileSource | DiskSource


def find_source(name: str, split: str, config: str | None) -> Source:
    """Find the split of a Hub dataset, a local folder or a local file. Raises `UserError`."""
    path = Path(name).expanduser().absolute()
    if path.is_file():
        return _file_source(name, path, split, config)
    if path.exists():
        if saved := local_files.saved_split(path, _base(split)):
            return DiskSource(name, split, saved)
        files = local_files.find_split(path, _base(split))
        if isinstance(files, RowFiles):
            return FileSource(name, split, files)
        return SplitSource(name, split, {"name": config, **files.arguments})
    if name.startswith((".", "/", "~")) or row_files.kind_of(path) or path.suffix == ".parquet":
        raise UserError(f"dataset_name: {name} does not exist here; give a local folder or file, or a Hub id")
    return SplitSource(name, split, {"name": config, "path": name})


def _file_source(name: str, path: Path, split: str, config: str | None) -> SplitSource | FileSource:
    if row_files.kind_of(path) is None and path.suffix != ".parquet":
        raise UserError(f"dataset_name: {name} is none of .jsonl, .json, .csv, .tsv, .parquet, nor a folder")
    own = local_files.split_of_file(path)
    if _base(split) != own:
        # Under another name, training rows would silently be used for evaluation.
        raise UserError(
            f"dataset {name}: has no split {_base(split)!r}: a file is one split, this one {own!r}; name it, take slices"
            f" of it such as {own}[:90%] and {own}[90%:], or give a folder of one file per split"
        )
    if row_files.kind_of(path):
        return FileSource(name, split, RowFiles((path,)))
    files = {own: [local_files.escaped(path)]}
    return SplitSource(name, split, {"name": config, "path": "parquet", "data_files": files})


def _base(split: str) -> str:
    return split.split("[")[0]


def _sliced(dataset: Dataset, split: str) -> Dataset:
    """Return the slice of a dataset that holds the whole split."""
    name = _base(split)
    if "[" not in split:
        return dataset
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(dataset)})
    sliced = [dataset.select(range(part.from_, part.to)) for part in parts]
    return sliced[0] if len(sliced) == 1 else datasets.concatenate_datasets(sliced)


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, DatasetGenerationError) and error.__cause__:  # which says only that there was one
        error = error.__cause__
    return error


def _refusal(name: str, split: str, error: BaseException) -> UserError:
    error = _first_cause(error)
    told = f"in its files {error.details()}" if isinstance(error, CastError) else first_line(error)
    return UserError(f"dataset {name}, split {split}: cannot be loaded: {told}")


def _undecoded(dataset: Any) -> Any:
    """Keep image columns as bytes and paths, which workers decode; and others' videos and sounds, which nobody reads."""
    for column, feature in (dataset.features or {}).items():
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, ClassLabel) and not is_bookkeeping(column) and column not in READ_BY_EVALUATION:
            dataset = _named(dataset, column, inner.names, isinstance(feature, List))
        if isinstance(inner, Image | Video | Audio):
            kept = type(inner)(decode=False)
            dataset = dataset.cast_column(column, List(kept) if isinstance(feature, List) else kept)
    return dataset


def _named(dataset: Any, column: str, names: list[str], is_list: bool) -> Any:
    """Put the names of classes in place of their numbers."""
    feature = List(Value("string")) if is_list else Value("string")
    if isinstance(dataset, IterableDataset):

        def name(row: dict[str, Any]) -> dict[str, Any]:
            return {column: _names_of(row[column], names)}

        return dataset.map(name, features=Features({**dataset.features, column: feature}))
    named = [_names_of(value, names) for value in dataset.with_format(None)[column]]
    order = dataset.column_names
    return dataset.remove_columns(column).add_column(column, named, feature=feature).select_columns(order)


def _names_of(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_names_of(part, names) for part in value]
    return names[value] if value is not None and value >= 0 else None
