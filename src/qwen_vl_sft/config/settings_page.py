"""The text of docs/settings.md, made from the declared recipe keys.

python -m qwen_vl_sft.config.settings_page > docs/settings.md
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import yaml

from qwen_vl_sft.config.coercion import expected
from qwen_vl_sft.config.settings import FORMER_KEYS, GROUPS, REFUSED_KEYS, TRAINING_DEFAULTS

HEAD = """\
# Recipe keys

This page is made from the code; `python -m qwen_vl_sft.config.settings_page > docs/settings.md` writes it anew.

A recipe is flat YAML of these keys; `--key value` on the command line wins over it. Every field of TRL's `SFTConfig` and
transformers' `TrainingArguments` is a key too, under its own name, unless it is listed under
[keys that cannot be set](#keys-that-cannot-be-set). `scripts/sft.py --help` lists all of them with their defaults.
"""
DEFAULTS = "TRL's and transformers' own defaults hold, except for these:"
REFUSED = "A recipe with one of these keys is refused with the reason."
FORMER = "Names from other versions and trainers. A recipe with one of them is refused with the key to write instead."


def settings_page() -> str:
    """Return the page as Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield HEAD
    for title, group in GROUPS.items():
        hints = typing.get_type_hints(group)
        yield f"## {title}\n"
        yield from _table(
            ("key", "value", "default", "what it does"),
            [
                (
                    _code(entry.name),
                    _cell(expected(hints[entry.name])),
                    _value(entry.default),
                    _cell(entry.metadata["help"]),
                )
                for entry in fields(group)
            ],
        )
    yield "## Training\n"
    yield f"{DEFAULTS}\n"
    yield from _table(("key", "default"), [(_code(name), _value(value)) for name, value in TRAINING_DEFAULTS.items()])
    yield "## Keys that cannot be set\n"
    yield f"{REFUSED}\n"
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED_KEYS.items():
        reasons.setdefault(reason, []).append(_code(name))
    yield from _table(("keys", "reason"), [(", ".join(names), _cell(reason)) for reason, names in reasons.items()])
    yield "## Other names\n"
    yield f"{FORMER}\n"
    yield from _table(("name", "write"), [(_code(name), _cell(key)) for name, key in FORMER_KEYS.items()], last=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], last: bool = False) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
    if not last:
        yield ""


def _value(value: Any) -> str:
    """Return a default as YAML writes it; nothing for an unset key."""
    if value is None:
        return ""
    return _code(yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip())


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(settings_page(), end="")
