"""Which files of a local folder make up a split: by their names, as `datasets` finds them."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from qwen_vl_sft.data import git_lfs, row_files
from qwen_vl_sft.data.media import archives
from qwen_vl_sft.data.row_files import RowFiles
from qwen_vl_sft.errors import UserError

# Files that hold one split say so by their names, also when they are numbered as on the Hub.
_NAMED_SPLIT = re.compile(r"(train|test|val|validation)(-\d+-of-\d+)?")
_METADATA = "metadata"


@dataclass(frozen=True)
class LoadedFiles:
    """Files that `load_dataset` reads: a local folder, or a builder of it with its files by split."""

    path: str
    data_files: dict[str, list[str]] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `load_dataset`.

        A folder whose README.md names its files is cached by the folder's name and that text alone: rows of another folder
        of this name, or those before a change, would be read. A description counts in the cache's name.
        """
        if self.data_files:
            return {"path": self.path, "data_files": self.data_files}
        return {"path": self.path, "description": _state_of(Path(self.path))}


def split_of_file(file: Path) -> str:
    """Return the split that a single file holds: "train" unless its name says another."""
    named = _NAMED_SPLIT.fullmatch(row_files.stem_of(file))
    return named[1] if named else "train"


def escaped(file: Path) -> str:
    """Return a path as a pattern that means this file alone, also where its name holds brackets or stars."""
    return glob.escape(str(file))


def find_split(folder: Path, split: str, image_folder: Path | None = None) -> RowFiles | LoadedFiles:
    """Return the files of a split in a folder; both folders are absolute paths. Raises `UserError` or `ValueError`.

    Tables beside images name them relative to `image_folder`, by default to their own folder. By default `load_dataset`
    reads a folder of JSONL and images as images only.
    """
    if tables := sorted(folder.rglob("*.parquet")):
        git_lfs.refuse_pointers(tables)
        return _loaded(folder)
    files = sorted(file for file in folder.iterdir() if row_files.kind_of(file) and not _is_metadata(file))
    if files:
        return RowFiles(_files_of_split(folder, files, split))
    listed = {name: [*_with_members(files)] for name, files in _listed(folder).items()}
    own = listed.get(split, [])
    texts = [file for file in own if row_files.kind_of(file)]
    if texts and not any(map(_is_metadata, texts)):
        return RowFiles(tuple(texts))
    if tables := [file for file in texts if _is_metadata(file)]:
        return RowFiles(tuple(tables), True, image_folder)
    if tables := _tables_above(own, folder):
        others = (str(file) for name, files in listed.items() if name != split for file in files)
        return RowFiles(tuple(tables), True, image_folder, frozenset(others))
    if listed and not own:
        raise UserError(f"dataset {folder}: has no split {split!r}; its files give {', '.join(listed)}")
    return _loaded(folder)


def saved_split(folder: Path, split: str) -> Path | None:
    """Return the folder of a split that `save_to_disk` has written, None for any other folder. Raises `UserError`."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        own = _json_of(folder / "state.json").get("_split") or "train"
        if split != own:
            raise UserError(f"dataset {folder}: has no split {split!r}; save_to_disk has written one, {own!r}")
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    splits = _json_of(folder / "dataset_dict.json").get("splits", [])
    if split not in splits:
        raise UserError(f"dataset {folder}: has no split {split!r}; save_to_disk has written {', '.join(splits)}")
    return folder / split


def _json_of(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"dataset {file.parent}: {file.name} of save_to_disk is no JSON; write the dataset anew"
        ) from None
    return found


def _with_members(files: Iterable[Path]) -> Iterator[Path]:
    """Yield files, and in place of archives what they hold."""
    for file in files:
        yield from archives.members(file) if file.suffix.lower() == ".zip" else [file]


def _is_metadata(file: Path) -> bool:
    return row_files.stem_of(file) == _METADATA and row_files.kind_of(file) is not None


def _tables_above(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return the tables of the folder that lie above some of these files: one for the images of several splits."""
    above = {parent for file in files for parent in file.parents if parent.is_relative_to(folder)}
    return sorted(file for parent in above if parent.is_dir() for file in parent.iterdir() if _is_metadata(file))


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split, as `load_dataset` finds them by their names."""
    home = folder.resolve()
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(escaped(home)), escaped(home))
    except (OSError, EmptyDatasetError):  # told when it is loaded
        return {}
    return {
        str(split): [folder / Path(file).relative_to(home) for file in files if Path(file).is_relative_to(home)]
        for split, files in found.items()
    }


def _state_of(folder: Path) -> str:
    """Digest the folder, and name, size and time of each of its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(folder), found)).encode()).hexdigest()


def _loaded(folder: Path) -> LoadedFiles:
    if not glob.has_magic(str(folder.resolve())):
        return LoadedFiles(str(folder))
    found = {
        split: [escaped(file) for file in files if file.suffix == ".parquet"]
        for split, files in _listed(folder).items()
    }
    if not any(found.values()):
        raise UserError(f"dataset {folder}: no rows are found in it; rename it without any of the characters [ ] * ?")
    return LoadedFiles("parquet", {split: files for split, files in found.items() if files})


def _files_of_split(folder: Path, files: Sequence[Path], split: str) -> tuple[Path, ...]:
    """Return the files of a split: one of its name, or those that are numbered as on the Hub."""
    own = [file for file in files if row_files.stem_of(file) == split]
    if len(own) > 1:
        both = " and ".join(file.name for file in own)
        raise UserError(f"dataset {folder}: split {split!r} has two files, {both}; keep one, or name one of them")
    if not own:
        numbered = {file: _NAMED_SPLIT.fullmatch(row_files.stem_of(file)) for file in files}
        own = [file for file, named in numbered.items() if named and named[1] == split]
    if not own:
        splits = dict.fromkeys(row_files.stem_of(file) for file in files)
        raise UserError(f"dataset {folder}: has no split {split!r}; its files give {', '.join(splits)}")
    return tuple(own)
