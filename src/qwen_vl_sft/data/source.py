"""The source of a split: finding it on the Hub or among local files, loading it, and the reason when that fails."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.load import infer_module_for_data_files_list
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.table import CastError

from qwen_vl_sft.data import git_lfs, local_files, row_files
from qwen_vl_sft.data.hub_folder import HubFolder, open_hub_folder
from qwen_vl_sft.data.media import archives
from qwen_vl_sft.data.row_files import RowFiles
from qwen_vl_sft.data.split_listing import Stated, read_card, read_stated
from qwen_vl_sft.data.undecoded import undecoded
from qwen_vl_sft.errors import UserError, first_line, shortened

logger = logging.getLogger(__name__)
# Builders of `datasets` that guess types.
_GUESSING = {"csv": "CSV", "json": "JSON"}
# Builders whose files hold typed rows: beside those of any other, text files hold the rows.
_TYPED = ("parquet", "arrow", "lance", "vortex", "hdf5")
# First rows of a stream that tell whether images are files.
_LOOKED_AT = 100


@dataclass(frozen=True)
class SplitSource:
    """A split, with its slice, and the `arguments` of `load_dataset` that find it."""

    name: str
    split: str
    arguments: dict[str, Any]

    def load(self) -> Any:
        """Load the split as a map-style dataset, undecoded. Raises `UserError`."""
        try:
            dataset = undecoded(datasets.load_dataset(**self.arguments, split=self.split))
            # Arrow does not check that text is UTF-8; Python would fail later, when the row is read.
            dataset.data.validate(full=True)
        except Exception as error:
            raise self.refusal(error) from error
        self._refuse_guessed_types(dataset)
        return dataset

    def stream(self) -> Any:
        """Open the split as a stream, undecoded, to be read by `in_one_shard`. Raises `UserError`."""
        try:
            dataset = undecoded(datasets.load_dataset(**self.arguments, split=self.split, streaming=True))
        except Exception as error:
            raise self.refusal(error) from error
        self._refuse_guessed_types(dataset)
        return dataset

    def in_one_shard(self, stream: IterableDataset) -> IterableDataset:
        """Return a stream that a data loader cannot deal out to its workers by files: each would count and cut a part."""
        return IterableDataset.from_generator(self._read, features=stream.features, gen_kwargs={"stream": stream})

    def refusal(self, error: BaseException) -> UserError:
        """Turn an error of `datasets`, which raises a dozen kinds for a wrong name, split or file, into one for the user."""
        return _refusal(self.name, self.split, error)

    def _refuse_guessed_types(self, dataset: Any) -> None:
        """Raise `UserError` for text files that `datasets` has read, as an earlier start may have left them in its cache."""
        kind = dataset.info.builder_name
        if kind in _GUESSING:
            raise UserError(
                f"dataset {self.name}: the cache of datasets has it as {_GUESSING[kind]} whose types were guessed (00501"
                " becomes 501); start once with a network, or fetch the files with hf download and give the folder as"
                " dataset_name"
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
    """A split, with its slice, that lies in text files: JSON, JSON lines, CSV or TSV; those of `hub` once they are needed."""

    name: str
    split: str
    files: RowFiles
    hub: HubFolder | None = None

    def load(self) -> Any:
        """Load the split as a map-style dataset of texts, see `row_files.parse_texts`. Raises `UserError`."""
        try:
            if self.hub:
                self.hub.fetch(self.files.files)
            return _sliced(self.files.prepare(), self.split)
        except Exception as error:
            raise self.refusal(error) from error

    def fetch_images(self, rows: Dataset | IterableDataset) -> Path | None:
        """Download the images that rows of a dataset on the Hub name. Raises `UserError`.

        Returns the folder that they are named relative to, that of the dataset or that of the file that holds the rows;
        None for local files.
        """
        if self.hub is None:
            return None
        folder, table = self.hub.folder, self.files.files[0]
        if self.files.name_images:
            self.hub.fetch_beside(self.files.files)
        elif named := self._first_named_image(rows):
            self.hub.fetch_images()
            if not _lies_in(folder, named) and _lies_in(table.parent, named):
                return table.parent
        return folder

    def _first_named_image(self, rows: Dataset | IterableDataset) -> str | None:
        if isinstance(rows, Dataset):
            return row_files.first_named_image(row_files.texts_that_name_images(rows))
        try:
            return row_files.first_named_image(
                text for text, _ in itertools.islice(self.files.texts_and_rows(), _LOOKED_AT)
            )
        except (ValueError, OSError) as error:
            raise self.refusal(error) from error

    def stream(self) -> IterableDataset:
        """Open the split as a stream of rows. Raises `UserError` where its files cannot be read any further."""
        if self.hub:
            self.hub.fetch(self.files.files[:1])
        return IterableDataset.from_generator(self._read)

    def in_one_shard(self, stream: IterableDataset) -> IterableDataset:
        """Return the stream: it is one already."""
        return stream

    def refusal(self, error: BaseException) -> UserError:
        """Turn an error of reading the files into one for the user."""
        return _refusal(self.name, self.split, error)

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            for file in self.files.files:
                if self.hub:
                    self.hub.fetch([file])
                yield from replace(self.files, files=(file,)).read()
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
            return _sliced(undecoded(dataset), self.split)
        except Exception as error:
            raise _refusal(self.name, self.split, error) from error

    def stream(self) -> IterableDataset:
        """Open the split as a stream, undecoded. Raises `UserError`."""
        return self.load().to_iterable_dataset()

    def in_one_shard(self, stream: IterableDataset) -> IterableDataset:
        """Return the stream: it is one already."""
        return stream


Source = SplitSource | FileSource | DiskSource


def find_source(
    name: str, split: str, config: str | None, image_folder: Path | None = None, revision: str | None = None
) -> Source:
    """Find the split of a Hub dataset, a local folder or a local file. Raises `UserError`.

    Tables beside images name them relative to `image_folder`, an absolute path, where it is stated.
    """
    path = Path(name).expanduser().absolute()
    try:
        if path.exists():
            if revision:
                logger.warning(
                    "dataset_revision: %s is not used: %s lies here, and is no dataset on the Hub", revision, name
                )
            return _local_source(name, path, split, config, image_folder)
        if name.startswith((".", "/", "~")) or row_files.kind_of(path) or path.suffix == ".parquet":
            raise UserError(
                f"dataset_name: {shortened(name)} does not exist here; give a local folder or file, or a Hub id"
            )
        return _hub_source(name, split, config, image_folder, revision)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise _refusal(name, split, error) from error


def _hub_source(name: str, split: str, config: str | None, image_folder: Path | None, revision: str | None) -> Source:
    """Find a split on the Hub: text files are read here, and all others by `datasets`."""
    by_datasets = SplitSource(
        name, split, {"name": config, "path": name} | ({"revision": revision} if revision else {})
    )
    # The names of its own readers win over the same names on the Hub.
    hub = None if name in _PACKAGED_DATASETS_MODULES else open_hub_folder(name, revision)
    if hub is None:
        return by_datasets
    try:
        stated = read_stated(read_card(hub.folder), config)
        listed = hub.list_splits(stated)
    except ValueError:
        # Of what is none of text, `datasets` tells whether it can read it.
        if _holds_text(hub.list_splits(Stated())):
            raise
        return by_datasets
    own = listed.get(_base(split), ())
    if not own:
        if not hub.online and not _holds_text(listed):
            return by_datasets  # which may have it in a cache of its own
        raise UserError(f"dataset {name}: {local_files.no_split(_base(split), listed)}")
    reader, _ = infer_module_for_data_files_list([file for file in own if not archives.is_archive(Path(file))])
    if reader in _TYPED:
        if reader == "parquet" and hub.lists_twice(stated):
            files = {_base(split): [f"{hub.address}/{file}" for file in own if file.endswith(".parquet")]}
            return SplitSource(name, split, {"path": "parquet", "data_files": files})
        return by_datasets
    if reader in _GUESSING:
        unread = [file for file in own if row_files.is_packed_otherwise(Path(file))]
        if unread:
            raise UserError(f"dataset {name}: {shortened(unread[0])} is compressed otherwise than as .gz, .bz2 or .xz")
        local_files.refuse_twice([hub.folder / file for file in own])
        # As `datasets`, which reads those of the kind that most files have.
        others = [file for file in own if row_files.kind_of(Path(file)) not in (reader, None)]
        if others:
            logger.warning(
                "dataset %s: %d of the files of split %s are not read, such as %s; most are %s",
                name, len(others), _base(split), shortened(others[0]), _GUESSING[reader],
            )  # fmt: skip
        listed[_base(split)] = tuple(file for file in own if file not in set(others))
    _fetch_tables(hub, listed, own)
    texts = local_files.split_of_listing(hub.folder, listed, stated, _base(split), image_folder)
    if texts is None:
        local_files.refuse_tar(f"dataset {name}", own)
        return by_datasets
    return FileSource(name, split, texts, hub)


def _holds_text(listed: Mapping[str, Iterable[str]]) -> bool:
    return any(row_files.kind_of(Path(file)) for files in listed.values() for file in files)


def _fetch_tables(hub: HubFolder, listed: Mapping[str, Iterable[str]], own: Iterable[str]) -> None:
    """Download what tells which rows are a split's: archives, and tables in the folders above images."""
    paths = [hub.folder / file for file in own]
    hub.fetch(path for path in paths if archives.is_archive(path))
    if not any(map(row_files.kind_of, paths)):
        hub.fetch_tables_above(paths)
        everyone = [hub.folder / file for files in listed.values() for file in files]
        hub.fetch(path for path in everyone if archives.is_archive(path))


def _lies_in(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() or bool(archives.find(path, folder))


def _local_source(name: str, path: Path, split: str, config: str | None, image_folder: Path | None) -> Source:
    if path.is_file():
        return _file_source(name, path, split, config)
    if saved := local_files.saved_split(path, _base(split)):
        git_lfs.refuse_pointers(saved.glob("*.arrow"))
        return DiskSource(name, split, saved)
    files = local_files.find_split(path, _base(split), image_folder, config)
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
    if isinstance(error, UserError):
        return error
    told = f"in its files {shortened(error.details())}" if isinstance(error, CastError) else first_line(error)
    if str(error).startswith("Couldn't cast"):
        # The types stand in the lines below the first.
        told = told if isinstance(error, CastError) else shortened(" ".join(str(error).split()))
        told += "; write all files of a split with the same columns and types"
    return UserError(f"dataset {name}, split {split}: cannot be loaded: {told}")
