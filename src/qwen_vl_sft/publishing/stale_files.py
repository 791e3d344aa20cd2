"""What a push may delete on the Hub: files that a former push left and listed there, and nothing of anybody else's."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.source import ADAPTER_FILE
from qwen_vl_sft.publishing.access import MAIN, Access
from qwen_vl_sft.publishing.files import LISTING

# Whole models and adapters, as transformers and PEFT look for them: a repository holds one of them.
_WEIGHTS = re.compile(r"(?:adapter_model|(?:pytorch_)?model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
_SHOWN = 5


def listed_files(access: Access, there: Collection[str], revision: str) -> set[str]:
    """What the last push says that it brought; empty without its list. Raises the client's errors."""
    if LISTING not in there:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        path = access.api.hf_hub_download(access.target.repo_id, LISTING, revision=revision, local_dir=folder)
        text = Path(path).read_bytes()
    try:
        return {str(name) for name in json.loads(text)["files"]}
    except (ValueError, KeyError, TypeError):  # a file of that name that no push of ours wrote
        return set()


def files_to_remove(
    there: Collection[str], listed: Collection[str], published: Collection[str], where: str, all_on_main: bool
) -> list[str]:
    """What must go so that the repository holds the published model alone, as far as it may.

    Args:
        there: the files on the Hub.
        listed: those of them that the last push brought, and maybe others that are gone.
        published: the files of this push.
        where: the repository and branch.
        all_on_main: the branch is still main's own commit, so that whatever goes from it remains on main.

    Raises `UserError` when weights would be left that are nobody's to delete here: loaders could take them for these.
    """
    same_kind = (ADAPTER_FILE in listed) == (ADAPTER_FILE in published)
    left = set(there) - set(published)
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
    """The first of some paths, and how many more there are."""
    more = len(paths) - _SHOWN
    return ", ".join([*list(paths)[:_SHOWN], *([f"{more} more"] if more > 0 else [])])
