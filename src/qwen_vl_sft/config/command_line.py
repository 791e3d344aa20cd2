"""The command line of scripts that take a recipe: `--recipe FILE`, `--key value`, and --help."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import yaml

from qwen_vl_sft.config.coercion import coerce, expected, load_yaml
from qwen_vl_sft.config.settings import GROUPS
from qwen_vl_sft.errors import UserError


def parse_command_line(
    arguments: Sequence[str], flags: Sequence[str] = ()
) -> tuple[str | None, dict[str, Any], set[str]]:
    """Split `--recipe FILE --key value --list a b --switch` into the file, the keys, and the `flags` given.

    Values are read as YAML; a key without a value is true. Raises `UserError`.
    """
    written: dict[str, list[str]] = {}
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
        name = "recipe" if name == "config" else name.replace("-", "_")
        if name in written:
            raise UserError(f"command line: --{name} is given twice; keep one")
        written[name] = words
    files = written.pop("recipe", None)
    if files is not None and len(files) != 1:
        raise UserError(f"command line: --recipe takes one file, not {' '.join(files) or 'none'}")
    values = _values(written)
    given = {flag for flag in flags if _is_on(flag, values.pop(flag, False))}
    return files[0] if files else None, values, given


def _is_on(flag: str, value: Any) -> bool:
    try:
        return coerce(value, bool)
    except ValueError:
        raise UserError(f"command line: --{flag}: {value!r} is not {expected(bool)}; alone it is true") from None


def _values(written: dict[str, list[str]]) -> dict[str, Any]:
    # Brings in the libraries, which take seconds to import; a mistyped command line needs none of them.
    from qwen_vl_sft.config.reading import text_keys

    texts = text_keys() if written else set()
    values = {name: [_value(word, name in texts) for word in words] for name, words in written.items()}
    return {name: True if not parts else parts[0] if len(parts) == 1 else parts for name, parts in values.items()}


def _value(word: str, is_text: bool) -> Any:
    try:
        value = load_yaml(word) if word else ""
    except (yaml.YAMLError, ValueError):
        return word  # not YAML, such as a bare `train[:10%]` or `@x`
    # What stays as it was written: a text with a colon, and a name such as 010.
    stays = (isinstance(value, dict) and not word.startswith("{")) or (is_text and type(value) in (int, float))
    return word if stays else value


def format_help(usage: str, switches: dict[str, str]) -> str:
    """--help in 80 columns: the switches, our keys by group, then the keys of TRL's `SFTConfig`."""
    from qwen_vl_sft.config.reading import key_hints, training_default

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
