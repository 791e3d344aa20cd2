"""Images in zip and tar archives: a path leads into one as if it were a folder (`images.zip/a.png`)."""

from __future__ import annotations

import functools
import io
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from qwen_vl_sft.data import git_lfs

SUFFIXES = (".zip", ".tar")
# Archives that cannot be read from the middle, or not at all.
_UNREAD = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
# What macOS writes beside the files of an archive.
_NOT_WRITTEN_BY_USERS = "__MACOSX/"


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive, by its name."""
    return path.suffix.lower() in SUFFIXES


def split_path(path: Path) -> tuple[Path, str] | None:
    """Return the archive that a path leads into, and the name in it; None for a path outside of archives."""
    for parent in path.parents:
        if is_archive(parent) and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def file_on_disk(path: Path) -> Path:
    """Return the file at a path, or the archive that the path leads into."""
    found = None if path.is_file() else split_path(path)
    return found[0] if found else path


def open_member(path: Path) -> IO[bytes]:
    """Open a file in an archive. Raises `OSError` for one that cannot be read."""
    found = split_path(path)
    if found is None:
        raise FileNotFoundError(str(path))
    archive, name = found
    try:
        if _is_tar(archive):
            begin, size = _tar_of(archive)[name]
            with archive.open("rb") as file:
                file.seek(begin)
                return io.BytesIO(file.read(size))
        return _opened(archive).open(name)
    except KeyError:
        raise FileNotFoundError(str(path)) from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, of another method
        raise OSError(f"in {archive.name}: {error}") from None


def members(archive: Path) -> Iterator[Path]:
    """Yield the paths of the files in an archive. Raises `OSError` or `ValueError` for a file that is none."""
    for name in _names(archive):
        yield archive / name


def find(path: Path, folder: Path) -> list[Path]:
    """Return where archives in `folder` hold a file that is not at `path`.

    An archive lies between the folder and the file: unpacked there, or into a folder of its own name, it would put the file
    at that path.
    """
    found = []
    for parent in path.parents:
        if not parent.is_relative_to(folder):
            break
        for archive in _archives_in(parent):
            inside = path.relative_to(parent)
            names = _names(archive)
            found += [archive / inside] if inside.as_posix() in names else []
            if inside.parts[0] == archive.stem and inside.relative_to(archive.stem).as_posix() in names:
                found.append(archive / inside.relative_to(archive.stem))
    return found


def unread_near(path: Path, folder: Path) -> Path | None:
    """Return an archive that is not read, in a folder that a file would lie in; None where there is none."""
    for parent in path.parents:
        if not parent.is_relative_to(folder):
            break
        if found := _archives_in(parent, _UNREAD):
            return found[0]
    return None


def _archives_in(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[Path, ...]:
    try:
        return _listed(folder, folder.stat().st_mtime_ns, suffixes)
    except OSError:
        return ()


@functools.lru_cache(maxsize=256)
def _listed(folder: Path, time: int, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(folder / entry.name for entry in entries if entry.name.lower().endswith(suffixes)))


def _names(archive: Path) -> frozenset[str]:
    stat = archive.stat()
    return _read_names(archive, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_names(archive: Path, size: int, time: int) -> frozenset[str]:
    found = _tar_of(archive) if _is_tar(archive) else _opened(archive).namelist()
    return frozenset(name for name in found if not name.endswith("/") and not name.startswith(_NOT_WRITTEN_BY_USERS))


def _opened(archive: Path) -> zipfile.ZipFile:
    stat = archive.stat()
    try:
        # A forked process must not read from its parent's place in the file.
        return _open(archive, stat.st_size, stat.st_mtime_ns, os.getpid())
    except zipfile.BadZipFile as error:
        git_lfs.refuse_pointers([archive])
        raise OSError(f"{archive.name} is no zip archive ({error})") from None


@functools.lru_cache(maxsize=64)
def _open(archive: Path, size: int, time: int, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def _is_tar(archive: Path) -> bool:
    return archive.suffix.lower() == ".tar"


def _tar_of(archive: Path) -> Mapping[str, tuple[int, int]]:
    """Return where each file lies in a tar archive: its first byte and its size."""
    stat = archive.stat()
    try:
        return _read_tar(archive, stat.st_size, stat.st_mtime_ns)
    except tarfile.TarError as error:
        git_lfs.refuse_pointers([archive])
        raise OSError(f"{archive.name} is no tar archive ({error})") from None


@functools.lru_cache(maxsize=64)
def _read_tar(archive: Path, size: int, time: int) -> Mapping[str, tuple[int, int]]:
    with tarfile.open(archive, "r:") as tar:
        # Of files of one name the last one counts. Names often begin with "./".
        found = {posixpath.normpath(entry.name): (entry.offset_data, entry.size) for entry in tar if entry.isreg()}
    cut = [name for name, (begin, length) in found.items() if begin + length > size]
    if cut:
        raise OSError(f"{archive.name} ends before {cut[0]} does; it was not copied whole")
    return found
