"""A dataset on the Hub at one commit: its files as they lie in the Hub's cache, downloaded when they are asked for."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import httpx

from qwen_vl_sft.data.media import archives
from qwen_vl_sft.data.media.image_file import IMAGE_SUFFIXES
from qwen_vl_sft.data.split_listing import CARD_FILES, Stated, list_splits, lists_twice
from qwen_vl_sft.errors import UserError, first_line, shortened

logger = logging.getLogger(__name__)
_UNREACHABLE = (httpx.TransportError, OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError)
_PREFIX = "hf://datasets/"


@dataclass(frozen=True)
class HubFolder:
    """A repository at a commit. `folder` is that of the commit in the cache; `online` whether the Hub can be reached."""

    repo_id: str
    commit: str
    folder: Path
    online: bool

    @property
    def address(self) -> str:
        """Return the address of its files on the Hub, or where they lie in the cache while it is out of reach."""
        return f"{_PREFIX}{self.repo_id}@{self.commit}" if self.online else str(self.folder)

    def list_splits(self, stated: Stated) -> dict[str, tuple[str, ...]]:
        """Return the files of each split, of those in the cache alone where the Hub is out of reach. Raises `ValueError`."""
        return list_splits(self._pattern, self.address, stated)

    def lists_twice(self, stated: Stated) -> bool:
        """Return whether `datasets` reads a file twice."""
        return lists_twice(self._pattern, self.address, stated)

    @property
    def _pattern(self) -> str:
        return self.address if self.online else glob.escape(self.address)

    def fetch(self, files: Iterable[Path]) -> None:
        """Download files that are not in the cache yet, named by where they lie in it then."""
        found = map(archives.file_on_disk, files)
        if missing := [file.relative_to(self.folder).as_posix() for file in found if not file.exists()]:
            self._fetch([glob.escape(name) for name in missing])

    def fetch_images(self) -> None:
        """Download all images, and archives that may hold some."""
        suffixes = (*IMAGE_SUFFIXES, *archives.SUFFIXES)
        self._fetch_once([f"*{suffix}" for found in suffixes for suffix in (found, found.upper())])

    def fetch_beside(self, files: Iterable[Path]) -> None:
        """Download all files of the folders that these lie in, and below."""
        self._fetch_once([f"{folder}*" for folder in sorted({self._as_pattern(file.parent) for file in files})])

    def fetch_tables_above(self, files: Iterable[Path]) -> None:
        """Download the tables beside images in all folders above these files."""
        folders = {folder for file in files for folder in file.parents if folder.is_relative_to(self.folder)}
        self._fetch_once([f"{folder}metadata.*" for folder in sorted(map(self._as_pattern, folders))])

    def _as_pattern(self, folder: Path) -> str:
        below = folder.relative_to(self.folder).as_posix()
        return "" if below == "." else f"{glob.escape(below)}/"

    def _fetch_once(self, patterns: list[str]) -> None:
        """Download what fits; out of reach of the Hub, a file that is missing is told by the row that names it."""
        # Looking for each of a million images in the cache would take minutes at every start.
        done = self.folder / f".fetched-{hashlib.sha256(repr(patterns).encode()).hexdigest()[:16]}"
        if self.online and not done.exists():
            self._fetch(patterns)
            with contextlib.suppress(OSError):  # a cache that others keep
                done.touch()

    def _fetch(self, patterns: list[str]) -> None:
        """Download the files that fit one of the patterns, in which a star goes over slashes too. Raises `UserError`."""
        try:
            snapshot_download(self.repo_id, repo_type="dataset", revision=self.commit, allow_patterns=patterns)
        except _UNREACHABLE as error:
            raise UserError(
                f"dataset {self.repo_id}: the Hub is out of reach, and the cache lacks files of commit {self.commit}"
                f" ({first_line(error)}); start once with a network, or fetch them with hf download"
            ) from error
        except Exception as error:
            raise _refusal(f"dataset {self.repo_id}", self.repo_id, error) from error


def open_hub_folder(name: str, revision: str | None) -> HubFolder | None:
    """Find a dataset on the Hub or in its cache, and download its README.md.

    Returns None where the Hub is out of reach and the cache has no copy. Raises `UserError` for a dataset that is not there,
    closed, or made by a script.
    """
    repo_id = name.removeprefix(_PREFIX)
    where = f"dataset {shortened(name)}" + (f", revision {shortened(revision)}" if revision else "")
    try:
        online = _is_reachable(repo_id, revision)
        resolved = HfApi().resolve_revision(
            repo_id, repo_type="dataset", revision=revision, local_files_only=not online
        )
        commit = str(resolved.resolved)
        online = online and _fetch_card(repo_id, commit)
    except _UNREACHABLE:
        return None
    except Exception as error:
        raise _refusal(where, repo_id, error) from error
    cache = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repo_id, repo_type="dataset")
    folder = (cache / "snapshots" / commit).resolve()
    if not online:
        if not folder.is_dir():
            return None
        # Where no network is wanted it need not be told.
        level = logging.INFO if constants.is_offline_mode() else logging.WARNING
        logger.log(level, "%s: the Hub is out of reach; its files in the cache are used, of commit %s", where, commit)
    return HubFolder(repo_id, commit, folder, online)


def _is_reachable(repo_id: str, revision: str | None) -> bool:
    """Ask the Hub of a dataset once: a download tries again for half a minute. Raises what the Hub answers."""
    if constants.is_offline_mode():
        return False
    try:
        HfApi().dataset_info(repo_id, revision=revision)
    except httpx.TransportError:
        return False
    return True


def _fetch_card(repo_id: str, commit: str) -> bool:
    """Download what describes the files; return whether the Hub can be reached. Raises `UserError` for a script."""
    script = f"{repo_id.split('/')[-1]}.py"
    for name in (*CARD_FILES, script):
        try:
            hf_hub_download(repo_id, name, repo_type="dataset", revision=commit)
        except LocalEntryNotFoundError:
            return False
        except EntryNotFoundError:
            continue
        if name == script:
            raise UserError(
                f"dataset {repo_id}: is made by a script, {script}, which is not run; where the Hub shows it as a table, set"
                " dataset_revision: refs/convert/parquet, else write its rows as JSONL or parquet"
            )
    return True


def _refusal(where: str, repo_id: str, error: Exception) -> UserError:
    login = "log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, UserError):
        return error
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{where}: is gated; ask for access on its page at {constants.ENDPOINT}/datasets/{repo_id}, and {login}"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{where}: has no such branch, tag or commit; check dataset_revision")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{where}: is not on the Hub, or is private; check the name, and {login}")
    if isinstance(error, HFValidationError):
        return UserError(f"{where}: is neither a local folder or file, nor a Hub id ({first_line(error)})")
    if isinstance(error, HfHubHTTPError):
        return UserError(
            f"{where}: the Hub answers {error.response.status_code} ({first_line(error)}); try again later"
        )
    return UserError(f"{where}: cannot be found: {first_line(error)}")
