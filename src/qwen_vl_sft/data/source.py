"""The source of a split: finding it on the Hub or among local files, loading it, and the reason when that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Audio, ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value, Video
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from qwen_vl_sft.data import formats, git_lfs, local_files, row_files
from qwen_vl_sft.data.row_files import RowFiles
from qwen_vl_sft.errors import UserError, first_line, shortened

logger = logging.getLogger(__name__)
# Builders of `datasets` that guess types; of local files they read none.
_GUESSING = {"csv": "CSV", "json": "JSON"}
_SHORT_FLOATS = {"float16": np.float16, "float32": np.float32}


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
        self._tell_guessed_types(dataset)
        return dataset

    def stream(self) -> Any:
        """Open the split as a stream, undecoded, to be read by `in_one_shard`. Raises `UserError`."""
        try:
            dataset = _undecoded(datasets.load_dataset(**self.arguments, split=self.split, streaming=True))
        except Exception as error:
            raise self.refusal(error) from error
        self._tell_guessed_types(dataset)
        return dataset

    def in_one_shard(self, stream: IterableDataset) -> IterableDataset:
        """Return a stream that a data loader cannot deal out to its workers by files: each would count and cut a part."""
        return IterableDataset.from_generator(self._read, features=stream.features, gen_kwargs={"stream": stream})

    def refusal(self, error: BaseException) -> UserError:
        """Turn an error of `datasets`, which raises a dozen kinds for a wrong name, split or file, into one for the user."""
        return _refusal(self.name, self.split, error)

    def _tell_guessed_types(self, dataset: Any) -> None:
        kind = dataset.info.builder_name
        if kind in _GUESSING:
            logger.warning(
                "dataset %s: it is %s on the Hub, where the types of its columns are guessed from its values (00501 becomes"
                " 501); for every value as it is written, download it with hf download and give the folder as dataset_name",
                self.name,
                _GUESSING[kind],
            )

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


def find_source(name: str, split: str, config: str | None, image_folder: Path | None = None) -> Source:
    """Find the split of a Hub dataset, a local folder or a local file. Raises `UserError`.

    Tables beside images name them relative to `image_folder`, an absolute path, where it is stated.
    """
    path = Path(name).expanduser().absolute()
    if not path.exists():
        if name.startswith((".", "/", "~")) or row_files.kind_of(path) or path.suffix == ".parquet":
            raise UserError(
                f"dataset_name: {shortened(name)} does not exist here; give a local folder or file, or a Hub id"
            )
        return SplitSource(name, split, {"name": config, "path": name})
    try:
        return _local_source(name, path, split, config, image_folder)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise _refusal(name, split, error) from error


def _local_source(name: str, path: Path, split: str, config: str | None, image_folder: Path | None) -> Source:
    if path.is_file():
        return _file_source(name, path, split, config)
    if saved := local_files.saved_split(path, _base(split)):
        git_lfs.refuse_pointers(saved.glob("*.arrow"))
        return DiskSource(name, split, saved)
    files = local_files.find_split(path, _base(split), image_folder)
    if isinstance(files, RowFiles):
        return FileSource(name, split, files)
    return SplitSource(name, split, {"name": config, **files.arguments})


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
    git_lfs.refuse_pointers([path])
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
    """Keep images as bytes and paths, which workers decode, and others' videos and sounds, which nobody reads.

    In columns that a format reads, classes get their names in place of their numbers, and numbers of 16 or 32 bits the
    value that their shortest text has: 0.1 and not 0.10000000149011612. All of that wherever they stand in a column.
    """
    read = {name for found in formats.FORMATS.values() for name in found.columns | found.optional}
    for column, feature in (dataset.features or {}).items():
        kept = _converted(feature, _without_decoding)
        if kept != feature:
            dataset = dataset.cast_column(column, kept)
        written = _converted(kept, _as_written)
        if written != kept and column in read:
            dataset = _with_values_as_written(dataset, column, kept, written)
    return dataset


def _converted(feature: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a feature with all that it holds converted."""
    if isinstance(feature, Mapping):
        return {name: _converted(inner, convert) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_converted(feature.feature, convert))
    return convert(feature)


def _without_decoding(feature: Any) -> Any:
    return type(feature)(decode=False) if isinstance(feature, Image | Video | Audio) else feature


def _as_written(feature: Any) -> Any:
    if isinstance(feature, ClassLabel):
        return Value("string")
    return Value("float64") if _is_short_float(feature) else feature


def _is_short_float(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in _SHORT_FLOATS


def _with_values_as_written(dataset: Any, column: str, feature: Any, written: Any) -> Any:
    if isinstance(dataset, IterableDataset):

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            return {column: _value_as_written(row[column], feature)}

        return dataset.map(convert, features=Features({**dataset.features, column: written}))
    values = [_value_as_written(value, feature) for value in dataset.with_format(None)[column]]
    order, added = dataset.column_names, f"{column} as written"
    with_both = dataset.add_column(added, values, feature=written)
    return with_both.remove_columns(column).rename_column(added, column).select_columns(order)


def _value_as_written(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Mapping):
        return {name: _value_as_written(value.get(name), inner) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return [_value_as_written(part, feature.feature) for part in value]
    if _is_short_float(feature):
        return float(str(_SHORT_FLOATS[feature.dtype](value)))
    if not isinstance(feature, ClassLabel):
        return value
    # A class that is not known has the number -1.
    return feature.names[value] if value >= 0 else None
