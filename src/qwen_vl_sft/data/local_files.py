"""Which files of a local folder make up a split, and which of them hold its rows."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_vl_sft.data import git_lfs, row_files
from qwen_vl_sft.data.media import archives
from qwen_vl_sft.data.row_files import RowFiles
from qwen_vl_sft.data.split_listing import Stated, list_splits, lists_twice, read_card, read_stated
from qwen_vl_sft.errors import UserError, quoted, shortened

logger = logging.getLogger(__name__)
# Files that hold one split say so by their names, also when they are numbered as on the Hub.
_NAMED_SPLIT = re.compile(r"(train|test|val|validation)(-\d+-of-\d+)?")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})(\..+)")
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


def find_split(folder: Path, split: str, image_folder: Path | None, config: str | None) -> RowFiles | LoadedFiles:
    """Return the files of a split in a folder; both folders are absolute paths. Raises `UserError` or `ValueError`.

    Tables beside images name them relative to `image_folder`, by default to their own folder. By default `load_dataset`
    reads a folder of JSONL and images as images only.
    """
    if tables := sorted(folder.rglob("*.parquet")):
        git_lfs.refuse_pointers(tables)
        tell_missing_parts(tables)
        _tell_unlisted(folder, tables)
        return _loaded(folder)
    stated = _stated(folder, config)
    if stated.names_files and split in (listed := _listed(folder, stated)):
        return split_of_listing(folder, listed, stated, split, image_folder) or _loaded(folder)
    there = sorted(folder.iterdir())
    files = [file for file in there if row_files.kind_of(file) and not is_metadata(file)]
    if packed := [file for file in there if row_files.is_packed_otherwise(file)]:
        raise UserError(
            f"dataset {folder}: {packed[0].name} is compressed otherwise than as .gz, .bz2 or .xz; unpack it"
        )
    if files:
        return _as_stated(RowFiles(_files_of_split(folder, files, split)), stated)
    listed = _listed(folder, replace(stated, data_files=None, data_dir=None))
    found = split_of_listing(folder, listed, stated, split, image_folder)
    if found is None and split in listed:
        refuse_tar(f"dataset {folder}", listed[split])
    elif found is None and listed:
        raise UserError(f"dataset {folder}: {no_split(split, listed)}")
    return found or _loaded(folder)


def split_of_listing(
    folder: Path, listed: Mapping[str, Sequence[str]], stated: Stated, split: str, image_folder: Path | None = None
) -> RowFiles | None:
    """Return the text files of a split in a listing of all splits, None where it has none. Raises `ValueError`."""
    own = [*_with_members(folder / name for name in listed.get(split, ()))]
    texts = [file for file in own if row_files.kind_of(file)]
    if texts and not any(map(is_metadata, texts)):
        refuse_twice(texts)
        return _as_stated(RowFiles(tuple(texts)), stated)
    if tables := [file for file in texts if is_metadata(file)]:
        refuse_twice(tables)
        return _as_stated(RowFiles(tuple(tables), True, image_folder), stated)
    if tables := _tables_above(own, folder):
        refuse_twice(tables)
        others = [folder / file for name, files in listed.items() if name != split for file in files]
        left_out = frozenset(map(str, _with_members(others)))
        return _as_stated(RowFiles(tuple(tables), True, image_folder, left_out), stated)
    return None


def is_metadata(file: Path) -> bool:
    """Return whether a file is a table beside images, by its name."""
    return row_files.stem_of(file) == _METADATA and row_files.kind_of(file) is not None


def _as_stated(files: RowFiles, stated: Stated) -> RowFiles:
    """Return files that are read as README.md says. Raises `ValueError` for what is not read."""
    if stated.unread:
        raise ValueError(
            f"README.md states {', '.join(stated.unread)} for its files, which is not read; write the rows as JSONL"
        )
    return replace(files, separator=stated.separator, classes=stated.classes)


def tell_missing_parts(files: Iterable[Path]) -> None:
    """Warn where the names of numbered files say that there are more of them."""
    found: dict[tuple[Path, str, int], int] = {}
    for file in files:
        if named := _NUMBERED.fullmatch(file.name):
            key = file.with_name(named[1]), named[3], int(named[2])
            found[key] = found.get(key, 0) + 1
    for (name, _, wanted), count in found.items():
        if count < wanted:
            logger.warning(
                "%s-*: %d of %d files are there, by their names; the rows of others are missing", name, count, wanted
            )


def _tell_unlisted(folder: Path, tables: Sequence[Path]) -> None:
    """Warn of files whose names tell no split, beside others that do: `datasets` leaves them out without a word."""
    try:
        if read_card(folder).get("configs"):
            return
    except ValueError:  # told when it is loaded
        return
    named = {file for files in _listed(folder, Stated()).values() for file in files}
    paths = [table.relative_to(folder) for table in tables]
    hidden = (".", "__")
    left_out = [
        path for path in paths if str(path) not in named and not any(part.startswith(hidden) for part in path.parts)
    ]
    if named and left_out:
        logger.warning(
            "dataset %s: %d of its %d parquet files belong to no split by their names and are not read, such as %s",
            folder, len(left_out), len(tables), shortened(str(left_out[0])),
        )  # fmt: skip


def refuse_twice(files: Sequence[Path]) -> None:
    """Raise `ValueError` for two files in a folder that differ in their kind alone: the same rows twice."""
    names: dict[Path, Path] = {}
    for file in filter(row_files.kind_of, files):
        first = names.setdefault(file.parent / row_files.stem_of(file), file)
        if first != file:
            raise ValueError(f"a split has two files of one name, {first.name} and {file.name}; keep one")


def saved_split(folder: Path, split: str) -> Path | None:
    """Return the folder of a split that `save_to_disk` has written, None for any other folder. Raises `UserError`."""
    if _is_saved(folder):
        own = _json_of(folder / "state.json").get("_split") or "train"
        if split != own:
            raise UserError(f"dataset {folder}: {no_split(split, [own], 'save_to_disk has written')}")
        return folder
    if (folder / "dataset_dict.json").is_file():
        splits = _json_of(folder / "dataset_dict.json").get("splits", [])
    else:  # splits that were written one by one
        splits = sorted(file.parent.name for file in folder.glob("*/state.json") if _is_saved(file.parent))
    if splits and split not in splits:
        raise UserError(f"dataset {folder}: {no_split(split, splits, 'save_to_disk has written')}")
    return folder / split if splits else None


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def no_split(split: str, names: Iterable[str], there: str = "its files give") -> str:
    """Return the rest of a message on a split that is not among those of a dataset."""
    found = list(names)
    way_out = "; name another as dataset_train_split or dataset_test_split, or rename its files" if found else ""
    return f"has no split {quoted(split)}; {there} {shortened(', '.join(found)) or 'none'}{way_out}"


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
        if not archives.is_archive(file):
            yield file
            continue
        # In a tar archive each text belongs to the image of its name, and holds no rows.
        holds_rows = file.suffix.lower() != ".tar"
        yield from (found for found in archives.members(file) if holds_rows or not _is_text(found))


def refuse_tar(where: str, files: Iterable[str]) -> None:
    """Raise `UserError` for files that are all tar archives: rows in them are not read."""
    if all(file.lower().endswith(".tar") for file in files):
        raise UserError(
            f"{where}: its rows lie in .tar archives (WebDataset), which are not read; write a line for each row into"
            " metadata.jsonl beside them, with file_name and the columns of a format; images are read from the archives"
        )


def _is_text(file: Path) -> bool:
    return row_files.kind_of(file) is not None and not is_metadata(file)


def _tables_above(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return the tables of the folder that lie above some of these files: one for the images of several splits."""
    above = {parent for file in files for parent in file.parents if parent.is_relative_to(folder)}
    return sorted(file for parent in above if parent.is_dir() for file in parent.iterdir() if is_metadata(file))


def _stated(folder: Path, config: str | None) -> Stated:
    try:
        card = read_card(folder)
    except ValueError as error:
        logger.warning("dataset %s: %s; it is left aside", folder, error)
        return Stated()
    if not card.get("configs") and config not in (None, "default"):
        logger.warning("dataset_config: %s is not used; no README.md of %s names configurations", config, folder)
        return read_stated(card, None)
    return read_stated(card, config)


def _listed(folder: Path, stated: Stated) -> dict[str, tuple[str, ...]]:
    """Return the files of each split, as paths below the folder. Raises `ValueError`."""
    home = folder.resolve()
    try:
        return list_splits(escaped(home), str(home), stated)
    except OSError:  # told when it is loaded
        return {}


def _state_of(folder: Path) -> str:
    """Digest the folder, and name, size and time of each of its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(folder), found)).encode()).hexdigest()


def _loaded(folder: Path) -> LoadedFiles:
    """Return what `load_dataset` reads: the folder, or its files where it would take it for another, or read files twice."""
    home = folder.resolve()
    if "::" in str(home):
        raise UserError(f"dataset {folder}: parquet files in a folder with :: in its path cannot be read; rename it")
    has_magic = glob.has_magic(str(home))
    if not has_magic and not _reads_twice(home):
        return LoadedFiles(str(folder))
    found = {
        split: [escaped(folder / file) for file in files if file.endswith(".parquet")]
        for split, files in _listed(folder, Stated()).items()
    }
    if not any(found.values()):
        if not has_magic:
            return LoadedFiles(str(folder))
        raise UserError(f"dataset {folder}: no rows are found in it; rename it without any of the characters [ ] * ?")
    return LoadedFiles("parquet", {split: files for split, files in found.items() if files})


def _reads_twice(home: Path) -> bool:
    try:
        return not read_card(home).get("configs") and lists_twice(escaped(home), str(home), Stated())
    except (OSError, ValueError):  # told when it is loaded
        return False


def _files_of_split(folder: Path, files: Sequence[Path], split: str) -> tuple[Path, ...]:
    """Return the files of a split: one of its name, or those that are numbered as on the Hub."""
    own = [file for file in files if row_files.stem_of(file) == split]
    if len(own) > 1:
        both = " and ".join(file.name for file in own)
        raise UserError(f"dataset {folder}: split {split!r} has two files, {both}; keep one, or name one of them")
    if not own:
        numbered = {file: _NAMED_SPLIT.fullmatch(row_files.stem_of(file)) for file in files}
        own = [file for file, named in numbered.items() if named and named[1] == split]
        if own:
            tell_missing_parts(own)
    if not own:
        splits = dict.fromkeys(row_files.stem_of(file) for file in files)
        raise UserError(f"dataset {folder}: {no_split(split, splits)}")
    return tuple(own)
