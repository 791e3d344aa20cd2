"""Comparison with the Hub: which files differ there, and which files of an earlier push are stale.

A push deletes only files that an earlier push listed, and nothing of anybody else's.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.adapter_layout import ADAPTER_FILE
from qwen_vl_sft.publishing.access import MAIN, Access
from qwen_vl_sft.publishing.files import LISTING, PublishedFile

# Whole models and adapters, as transformers and PEFT look for them: a repository holds one of them.
_WEIGHTS = re.compile(r"(?:adapter_model|(?:pytorch_)?model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
_SHOWN = 5


def differences(access: Access, files: Sequence[PublishedFile], revision: str) -> dict[str, str]:
    """Return path and reason of each file that is missing or different on the Hub. Raises the client's errors."""
    found = access.api.get_paths_info(access.target.repo_id, [file.path for file in files], revision=revision)
    remote: dict[str, Any] = {entry.path: entry for entry in found}
    return {file.path: reason for file in files if (reason := _difference(file, remote.get(file.path)))}


def listed_files(access: Access, on_hub: Collection[str], revision: str) -> set[str]:
    """Return the files that the last push listed; empty without a list. Raises the client's errors."""
    if LISTING not in on_hub:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        path = access.api.hf_hub_download(access.target.repo_id, LISTING, revision=revision, local_dir=folder)
        text = Path(path).read_bytes()
    try:
        return {str(name) for name in json.loads(text)["files"]}
    except (ValueError, KeyError, TypeError):  # a file of that name that no push of ours wrote
        return set()


def stale_files(
    on_hub: Collection[str], listed: Collection[str], published: Collection[str], where: str, all_on_main: bool
) -> list[str]:
    """Return the files to delete: obsolete files of our previous push, and weights that loaders could take for these.

    Args:
        on_hub: the files on the Hub.
        listed: the files that the last push listed; some may be gone.
        published: the files of this push.
        where: the repository and branch.
        all_on_main: the branch is still at main's commit, so that what is deleted from it remains on main.

    Raises `UserError` when weights of somebody else would be left beside the published ones.
    """
    same_kind = (ADAPTER_FILE in listed) == (ADAPTER_FILE in published)
    left = set(on_hub) - set(published)
    gone = left & set(listed) if same_kind or all_on_main else set()
    weights = {path for path in left - gone if _WEIGHTS.fullmatch(path)}
    if weights and not all_on_main:
        raise UserError(
            f"push: {where} holds another model ({named(sorted(weights))}), which a push of this one may not delete."
            f" Nothing was changed. Name another repository, or a new branch with --branch (hub_revision), which leaves"
            f" {MAIN} as it is"
        )
    return sorted(gone | weights)


def named(paths: Collection[str]) -> str:
    """Name the first of some paths, and how many more there are."""
    more = len(paths) - _SHOWN
    return ", ".join([*list(paths)[:_SHOWN], *([f"{more} more"] if more > 0 else [])])


def _difference(file: PublishedFile, remote: Any) -> str | None:
    size = getattr(remote, "size", None)  # a folder has none
    if size is None:
        return "missing"
    if size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    equal = remote.lfs.sha256 == file.sha256 if remote.lfs else remote.blob_id == file.git_sha1
    return None if equal else "other content"
