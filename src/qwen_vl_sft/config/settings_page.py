"""The texts of docs/settings.md and docs/other_trainers.md, made from the declared recipe keys.

python -m qwen_vl_sft.config.settings_page > docs/settings.md
python -m qwen_vl_sft.config.settings_page other_trainers > docs/other_trainers.md
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml

from qwen_vl_sft.config.coercion import expected
from qwen_vl_sft.config.other_trainers import FORMER_KEYS, WITHOUT_COUNTERPART
from qwen_vl_sft.config.settings import GROUPS, REFUSED_KEYS, TRAINING_DEFAULTS

HEAD = """\
# Recipe keys

This page is made from the code; `python -m qwen_vl_sft.config.settings_page > docs/settings.md` writes it anew.

A recipe is flat YAML of these keys; `--key value` on the command line wins over it. Every field of TRL's `SFTConfig` and
transformers' `TrainingArguments` is a key too, under its own name, unless it is listed under
[keys that cannot be set](#keys-that-cannot-be-set). `scripts/sft.py --help` lists all of them with their defaults.
"""
DEFAULTS = "TRL's and transformers' own defaults hold, except for these:"
REFUSED = "A recipe with one of these keys is refused with the reason."
OTHER_TRAINERS = """\
# Keys of other trainers

This page is made from the code; `python -m qwen_vl_sft.config.settings_page other_trainers > docs/other_trainers.md`
writes it anew.

Keys of LLaMA-Factory, ms-swift, axolotl and unsloth, and of earlier versions of transformers and TRL. A recipe with one of
them is refused with what stands here. [settings.md](settings.md) has our keys.
"""


def settings_page() -> str:
    """Return the page as Markdown."""
    return "\n".join(_lines()) + "\n"


def other_trainers_page() -> str:
    """Return the page of other trainers' keys as Markdown."""
    lines = [OTHER_TRAINERS, *_table(("keys", "write"), _by_text(FORMER_KEYS)), "## Keys without a counterpart\n"]
    lines += _table(("keys", "what to know"), _by_text(WITHOUT_COUNTERPART), last=True)
    return "\n".join(lines) + "\n"


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
    yield from _table(("keys", "reason"), _by_text(REFUSED_KEYS))
    yield "[Keys of other trainers](other_trainers.md) are refused with the key to write instead."


def _by_text(keys: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return rows of the keys that share a text, and the text."""
    names: dict[str, list[str]] = {}
    for name, text in keys.items():
        names.setdefault(text, []).append(_code(name))
    return [(", ".join(found), _cell(text)) for text, found in names.items()]


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
    print(other_trainers_page() if sys.argv[1:] == ["other_trainers"] else settings_page(), end="")
