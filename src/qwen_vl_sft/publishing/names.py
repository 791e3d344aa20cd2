"""Names on the Hub and on this machine: valid repository names, public names, and texts without local paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwen_vl_sft import tiny
from qwen_vl_sft.errors import UserError, quoted

BUILTIN_PREFIX = "builtin:"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REPO_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_BRANCH = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
# An absolute path of two parts or more, or one below the home folder; not the path of a URL.
_PATH = re.compile(r"(?<![\w.:/<>~])(?:~|/[^\s/:'\"\[\],]+)(?:/[^\s/:'\"\[\],]+)+/?")
# A text that is nothing but a path, perhaps with spaces in it, and perhaps with a split in brackets after it.
_WHOLE_PATH = re.compile(r"((?:~|/[^/\n]+)/[^\n]+?)( \[[^\]]*\])?")


def problem_of_repo_id(name: str) -> str | None:
    """Return why `name` cannot be a repository, or None."""
    if _REPO_ID.fullmatch(name) and "--" not in name and ".." not in name and not name.endswith(".git"):
        return None
    return (
        f"{quoted(name)} is not the name of a repository; write user/name or organization/name, of letters, digits, - _ and"
        f" single dots"
    )


def problem_of_branch(name: str) -> str | None:
    """Return why `name` cannot be a branch, or None."""
    if _BRANCH.fullmatch(name) and ".." not in name and "//" not in name and not name.startswith("refs/"):
        return None
    return f"{quoted(name)} is not the name of a branch; write a plain one such as v2"


def is_local(name: str) -> bool:
    """Return whether a model or dataset is a local folder or file rather than a Hub id."""
    return name.startswith((".", "/", "~")) or Path(name).exists() or name.count("/") > 1


def hub_id(name: str | None) -> str | None:
    """Return the name if it is a Hub id, else None."""
    return name if name and not is_local(name) and ":" not in name else None


def public_name(name: str) -> str:
    """Return the name of a model or dataset without local folders: `builtin:NAME`, a Hub id, or `local:NAME`."""
    builtin = tiny.builtin_name(name)
    if builtin:
        return builtin
    return f"local:{_last_part(name)}" if is_local(name) else name


def without_paths(value: Any) -> Any:
    """Return the same JSON-like value with every absolute path reduced to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    for name, folder in tiny.BUILTIN.items():
        value = tiny.ANYWHERE[name].sub(name, value.replace(str(folder), name))
    whole = _WHOLE_PATH.fullmatch(value)
    if whole:
        return f"local:{_last_part(whole[1])}{whole[2] or ''}"
    return _PATH.sub(lambda match: f"local:{_last_part(match[0])}", value)


def problem_of_base(model: str | None, use_peft: bool) -> str | None:
    """Return why a run on this base model could not be published when it ends, or None."""
    if model and use_peft and public_base(model, None) is None:
        return (
            f"push_to_hub: the base model {model} is a local folder, and nobody else could load the adapter without it; set"
            f" model_name_or_path to its Hub id, or publish after training with scripts/push.py and --base_model"
        )
    return None


def public_base(name: str | None, stated: str | None) -> str | None:
    """Return the base model's name for others: the `stated` Hub id, else `name` if others can load it. Raises `UserError`."""
    if stated is not None:
        problem = problem_of_repo_id(stated) or (None if hub_id(stated) else f"{stated} is a folder here, not a Hub id")
        if problem:
            raise UserError(f"--base_model: {problem}")
        return stated
    public = public_name(name) if name else None
    return public if public and (hub_id(public) or public.startswith(BUILTIN_PREFIX)) else None


def _last_part(path: str) -> str:
    """Return the name of a folder or file, unless it may be a user's name."""
    parts = [part for part in Path(path).parts if part not in ("/", "~", ".", "..")]
    is_home = len(parts) == 2 and parts[0] in ("home", "Users")
    return "here" if not parts or is_home or parts[-1] == Path.home().name else parts[-1]
