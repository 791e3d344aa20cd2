"""Names on the Hub and on this machine: what a repository may be called, and how local paths are told and taken out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwen_vl_sft import tiny

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REPO_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_BRANCH = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
# An absolute path of two parts or more, or one below the home folder; not the path of a URL.
_PATH = re.compile(r"(?<![\w.:/<>~])(?:~|/[^\s/:'\"\[\],]+)(?:/[^\s/:'\"\[\],]+)+/?")
# A text that is nothing but a path, perhaps with spaces in it, and perhaps with a split in brackets after it.
_WHOLE_PATH = re.compile(r"((?:~|/[^/\n]+)/[^\n]+?)( \[[^\]]*\])?")
_BUILTIN = {str(tiny.MODEL_DIR): "builtin:tiny-qwen2-vl", str(tiny.DATA_DIR): "builtin:tiny-charts"}


def problem_of_repo_id(name: str) -> str | None:
    """Why `name` cannot be a repository, None when it can."""
    if _REPO_ID.fullmatch(name) and "--" not in name and ".." not in name and not name.endswith(".git"):
        return None
    return (
        f"{name!r} is not the name of a repository; write user/name or organization/name, of letters, digits, - _ and"
        f" single dots"
    )


def problem_of_branch(name: str) -> str | None:
    """Why `name` cannot be a branch, None when it can."""
    if _BRANCH.fullmatch(name) and ".." not in name and "//" not in name and not name.startswith("refs/"):
        return None
    return f"{name!r} is not the name of a branch; write a plain one such as v2"


def is_local(name: str) -> bool:
    """Whether a model or dataset is a folder or file here rather than a Hub id."""
    return name.startswith((".", "/", "~")) or Path(name).exists() or name.count("/") > 1


def hub_id(name: str | None) -> str | None:
    """The name when it is one that others find on the Hub, else None."""
    return name if name and not is_local(name) and ":" not in name else None


def public_name(name: str) -> str:
    """The name of a model or dataset without the folders above it: what ships with the package, a Hub id, or `local:NAME`."""
    if name in _BUILTIN:
        return _BUILTIN[name]
    return f"local:{_last_part(name)}" if is_local(name) else name


def without_paths(value: Any) -> Any:
    """The same JSON-like value without this machine's folders: of an absolute path its last part is kept."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    for path, name in _BUILTIN.items():
        value = value.replace(path, name)
    whole = _WHOLE_PATH.fullmatch(value)
    if whole:
        return f"local:{_last_part(whole[1])}{whole[2] or ''}"
    return _PATH.sub(lambda match: f"local:{_last_part(match[0])}", value)


def _last_part(path: str) -> str:
    """The name of a folder or file, unless it may be that of a user."""
    parts = [part for part in Path(path).parts if part not in ("/", "~", ".", "..")]
    is_home = len(parts) == 2 and parts[0] in ("home", "Users")
    return "here" if not parts or is_home or parts[-1] == Path.home().name else parts[-1]
