"""The command line of scripts that take a recipe: `--recipe FILE`, `--key value`, and --help."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import yaml

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.recipe.coercion import expected, load_yaml
from qwen_vl_sft.recipe.settings import GROUPS


def parse_command_line(
    arguments: Sequence[str], flags: Sequence[str] = ()
) -> tuple[str | None, dict[str, Any], set[str]]:
    """Split `--recipe FILE --key value --list a b --switch` into the file, the keys, and the `flags` given.

    Values are read as YAML; a key without a value is true.
    """
    recipe, overrides, given = None, {}, set()
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--"):
            raise UserError(f"command line: {word!r} stands alone; write --key value, or --recipe FILE for a recipe")
        name, assigned, value = word[2:].partition("=")
        words = [value] if assigned else []
        while not assigned and position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        name = name.replace("-", "_")
        if name in flags and not words:
            given.add(name)
        elif name in ("recipe", "config"):
            if len(words) != 1:
                raise UserError(f"command line: --recipe takes one file, not {' '.join(words) or 'none'}")
            recipe = words[0]
        elif name in overrides:
            raise UserError(f"command line: --{name} is given twice; keep one")
        else:
            overrides[name] = _command_line_value(name, words)
    return recipe, overrides, given


def _command_line_value(name: str, words: list[str]) -> Any:
    try:
        values = [load_yaml(word) if word else "" for word in words]
    except (yaml.YAMLError, ValueError):
        values = list(words)  # not YAML, such as a bare `train[:10%]` or `@x`: plain text
    # A split slice such as [1:2] must stay as it was written.
    values = [
        word if isinstance(value, dict) and not word.startswith("{") else value
        for word, value in zip(words, values, strict=True)
    ]
    return True if not values else values[0] if len(values) == 1 else values


def format_help(usage: str, switches: dict[str, str]) -> str:
    """--help in 80 columns: the switches, our keys by group, then the keys of TRL's `SFTConfig`."""
    from qwen_vl_sft.recipe.reading import key_hints, training_default

    hints = key_hints()
    lines = [usage, "", "Command line"]
    for name, text in {"recipe FILE": "flat YAML of the keys below; --key value wins over it", **switches}.items():
        lines += _entry(f"--{name}", text)
    ours = set()
    for title, group in GROUPS.items():
        lines += ["", title]
        for entry in fields(group):
            ours.add(entry.name)
            default = "" if entry.default in (None, MISSING) else f" [{entry.default}]"
            lines += _entry(f"--{entry.name}", f"{entry.metadata['help']} ({expected(hints[entry.name])}){default}")
    lines += ["", "Training: fields of TRL's SFTConfig and transformers' TrainingArguments"]
    for name in hints:
        if name not in ours:
            default = training_default(name)
            shown = "" if default is None else f" [{getattr(default, 'value', default)}]"
            lines += _entry(f"--{name}", f"{expected(hints[name])}{shown}")
    return "\n".join(lines)


def _entry(name: str, text: str) -> list[str]:
    """A key and its text, indented; the text starts beside the key when there is room."""
    first = f"  {name:<30}" if len(name) <= 29 else f"  {name}\n{'':<32}"
    wrapped = textwrap.wrap(text, 47) or [""]
    return [first + wrapped[0], *(f"{'':<32}{line}" for line in wrapped[1:])]
