"""An adapter on the Hub that a run starts from: downloaded at one commit, which the recipe of the run then names."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qwen_vl_sft.errors import UserError, first_line, shortened
from qwen_vl_sft.modeling.adapter_layout import ADAPTER_CONFIG, ADAPTER_FILE


def is_on_hub(name: str) -> bool:
    """Return whether a name is that of a repository, with or without `@REVISION`, and of no folder here."""
    is_path = name.startswith((".", "/", "~")) or Path(name).expanduser().exists()
    return not is_path and name.count("/") == 1


def pinned(name: str) -> str:
    """Return `OWNER/NAME@COMMIT` for an adapter on the Hub, and any other name as it is. Raises `UserError`."""
    if not is_on_hub(name):
        return name
    repo, _, revision = name.partition("@")
    try:
        return f"{repo}@{HfApi().resolve_revision(repo, revision=revision or None).resolved}"
    except Exception as error:
        raise _refusal(name, error) from error


def adapter_folder(name: str) -> Path:
    """Return the folder of an adapter: the one that is named, or of the Hub's cache, downloaded. Raises `UserError`."""
    if not is_on_hub(name):
        return Path(name).expanduser()
    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[ADAPTER_CONFIG, ADAPTER_FILE]))
    except Exception as error:
        raise _refusal(name, error) from error


def _refusal(name: str, error: Exception) -> UserError:
    where = f"init_adapter: {shortened(name)}"
    if isinstance(error, HFValidationError):
        return UserError(
            f"{where} is not a folder here; name a run folder, a checkpoint, a folder of PEFT, or a Hub id"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{where} has no such branch, tag or commit on the Hub; check what stands after @")
    if isinstance(error, GatedRepoError | RepositoryNotFoundError):
        return UserError(
            f"{where} is neither a folder here, nor visible on the Hub; check the name, and log in with hf auth login, or set"
            " HF_TOKEN"
        )
    return UserError(f"{where} cannot be downloaded: {first_line(error)}; check the network, or give a folder")
