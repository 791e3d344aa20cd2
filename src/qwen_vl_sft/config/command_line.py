"""The command line of every script: a frozen dataclass of options becomes a parser with --help.

An option is a field made with `option`: its type, default and help text. A script that also takes keys of a recipe has
a field made with `recipe_keys` (some keys, values as they were written) or `any_recipe_key` (every key). Both
`--key value` and `--key=value` are read, dashes count as underscores, and a switch takes true and false. What cannot be
understood raises one `UserError` that lists every problem. Importing this module brings in no library.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qwen_vl_sft.config.coercion import coerce, expected, load_yaml
from qwen_vl_sft.config.other_trainers import FORMER_KEYS, WITHOUT_COUNTERPART
from qwen_vl_sft.config.settings import GROUPS, REFUSED_KEYS
from qwen_vl_sft.errors import UserError, quoted, raise_all, shortened

Options = TypeVar("Options")
REQUIRED: Any = MISSING
# Keys of transformers' TrainingArguments that scripts other than sft.py take too.
TRAINING_KEYS = {"use_cpu": "compute on the CPU even if there is a GPU"}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
WIDTH, TEXT_COLUMN = 80, 32


def option(
    default: Any,
    text: str,
    *,
    metavar: str | None = None,
    at_least: int | None = None,
    parse: Callable[[str], Any] | None = None,
    also: str | None = None,
    shown: str | None = None,
) -> Any:
    """Declare an option of a command line.

    Args:
        default: the value where it is not given, or `REQUIRED`.
        text: its line in --help.
        metavar: what its value is, for --help and messages.
        at_least: the smallest number allowed.
        parse: makes the value from one word; a `ValueError` says what is wrong with it ("is not a size").
        also: a second name.
        shown: how --help writes the default.
    """
    details = {"metavar": metavar, "at_least": at_least, "parse": parse, "also": also, "shown": shown}
    return dataclasses.field(default=default, metadata={"help": text, **details})


def recipe_keys(*names: str) -> Any:
    """Declare the field of some recipe keys, a `dict[str, str]` of values as they were written."""
    return dataclasses.field(default_factory=dict, metadata={"recipe_keys": names})


def any_recipe_key(listed: bool = False) -> Any:
    """Declare the field of all other words, a `dict[str, list[str]]` for `recipe_values`; `listed`: --help has them."""
    return dataclasses.field(default_factory=dict, metadata={"recipe_keys": None, "listed": listed})


def parse(kind: type[Options], arguments: Sequence[str] | None = None, usage: str | None = "") -> Options:
    """Read a command line (default: this process's) into an options dataclass; --help prints `usage` and ends.

    Raises `UserError` with every unknown option, missing option and wrong value.
    """
    options, keys = _declared(kind)
    takes_any_key = keys is not None and keys.metadata["recipe_keys"] is None
    # Keys of a recipe may be given once, as in its file, and so may all options of the script that trains it. Elsewhere
    # an option may be repeated, as where a shell script's defaults come first.
    once = keys is not None and keys.metadata.get("listed", False)
    own = {entry.name for entry in options}
    words = split_words(
        sys.argv[1:] if arguments is None else arguments,
        repeatable=lambda name: not once and (name in own or not takes_any_key),
    )
    hints, problems, values = typing.get_type_hints(kind), [], {}
    try:
        wants_help = "help" in words and _switch(words.pop("help"))
    except ValueError as error:
        raise UserError(f"command line: --help{error}") from None
    if wants_help:
        print(format_help(kind, usage or ""))
        raise SystemExit(0)
    for entry in options:
        names = [name for name in (entry.name, entry.metadata["also"]) if name in words]
        if len(names) > 1:
            problems.append(f"command line: --{entry.name} is given twice; keep one")
        if names:
            try:
                values[entry.name] = _value(entry, words[names[0]], hints[entry.name])
            except ValueError as error:
                problems.append(f"command line: --{entry.name}{error}")
        elif entry.default is REQUIRED:
            hint = hints[entry.name]
            wanted = expected(hint) if typing.get_origin(hint) is typing.Literal else entry.metadata["help"]
            problems.append(f"command line: --{entry.name} is missing; give {wanted}")
        for name in names:
            del words[name]
    if keys is not None and takes_any_key:
        values[keys.name], words = words, {}
    elif keys is not None:
        given = {name: words.pop(name) for name in keys.metadata["recipe_keys"] if name in words}
        values[keys.name] = {name: _text(name, parts, problems) for name, parts in given.items()}
    problems += [f"command line: {_unknown(name, option_names(kind))}" for name in words]
    raise_all(problems)
    return kind(**values)


def split_words(
    arguments: Sequence[str], repeatable: Callable[[str], bool] = lambda name: False
) -> dict[str, list[str]]:
    """Split `--key value --list a b --switch --key=value` into keys and the words of each.

    A `repeatable` key takes the last value. Raises `UserError` for a word without a key and for any other key that is
    given twice.
    """
    found: dict[str, list[str]] = {}
    position = 0
    while position < len(arguments):
        word = arguments[position] if arguments[position] != "-h" else "--help"
        position += 1
        if not word.startswith("--"):
            raise UserError(f"command line: {quoted(word)} has no key before it; write --key value")
        name, assigned, value = word[2:].partition("=")
        words = [value] if assigned else []
        while not assigned and position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        name = name.replace("-", "_")
        if name in found and not repeatable(name):
            raise UserError(f"command line: --{shortened(name)} is given twice; keep one")
        found[name] = words
    return found


def recipe_values(words: Mapping[str, Sequence[str]], options: Any = None) -> dict[str, Any]:
    """Read the words of recipe keys as YAML; a key without a word is true.

    Raises `UserError` for a mistyped option of `options`; other unknown keys are reported when the recipe is read.
    """
    if not words:
        return {}
    from qwen_vl_sft.config.reading import key_hints, text_keys

    own = option_names(type(options)) if options else []
    keys = [*key_hints(), *REFUSED_KEYS, *FORMER_KEYS, *WITHOUT_COUNTERPART]
    nearest = {name: difflib.get_close_matches(name, [*own, *keys], n=1) for name in words if name not in keys}
    mistyped = [name for name, near in nearest.items() if set(near) & set(own)]
    raise_all([f"command line: {_unknown(name, own)}" for name in mistyped])
    texts = text_keys()
    values = {name: [_yaml(word, name in texts) for word in parts] for name, parts in words.items()}
    return {name: True if not parts else parts[0] if len(parts) == 1 else parts for name, parts in values.items()}


def refuse_recipe_keys(words: Collection[str], options: Any, why: str) -> None:
    """Raise `UserError` where words are no options and there is no recipe that they could be keys of, which `why` tells."""
    own = option_names(type(options))
    raise_all([f"command line: {_unknown(name, own)}; {why}" for name in words])


def names(text: str) -> tuple[str, ...]:
    """Read names between commas, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise ValueError("names nothing")
    return found


def size(text: str) -> int:
    """Read a number of bytes such as 4GB, 500 K or 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    number = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if number < 1:
        raise ValueError("is not a size such as 4GB or 500MB")
    return number


def option_names(kind: type) -> list[str]:
    """Return the names of all options, including the listed recipe keys."""
    options, keys = _declared(kind)
    return [*(entry.name for entry in options), *(keys.metadata["recipe_keys"] or () if keys else ()), "help"]


def format_help(kind: type, usage: str) -> str:
    """Format --help in 80 columns: usage, options, then the recipe keys that the script takes."""
    hints = typing.get_type_hints(kind)
    options, keys = _declared(kind)
    lines = [usage.strip(), "", "Options"]
    for entry in options:
        metavar = entry.metadata["metavar"] or ""
        name = f"--{entry.name}" + (f" {metavar.upper()}" if metavar else "")
        lines += _line(name, entry.metadata["help"], _kind(hints[entry.name], entry), _default(entry))
    lines += _line("--help", "this text")
    if keys is not None and keys.metadata["recipe_keys"] is not None:
        lines += ["", "Keys of a recipe; they win over the run's recipe"]
        described = _described()
        for name in keys.metadata["recipe_keys"]:
            lines += _line(f"--{name}", *described[name])
    elif keys is not None and keys.metadata["listed"]:
        lines += _all_keys()
    elif keys is not None:
        lines += ["", "Every other --key value goes to the recipe: scripts/sft.py --help lists them."]
    return "\n".join(lines)


def _declared(kind: type) -> tuple[list[Field[Any]], Field[Any] | None]:
    """Return the options of a dataclass, and its field of recipe keys."""
    keys = [entry for entry in fields(kind) if "recipe_keys" in entry.metadata]
    return [entry for entry in fields(kind) if "help" in entry.metadata], keys[0] if keys else None


def _value(entry: Field[Any], words: list[str], hint: Any) -> Any:
    """Return the typed value of an option. A `ValueError` holds the rest of the message, after the option's name."""
    hint = _without_none(hint)
    if hint is bool:
        return _switch(words)
    several = typing.get_origin(hint) is tuple
    parse = entry.metadata["parse"]
    if several and not parse:
        if not words:
            raise ValueError(" takes one or more, not none")
        return tuple(_single(entry, word, typing.get_args(hint)[0]) for word in words)
    if len(words) != 1:
        raise ValueError(
            f" takes one {entry.metadata['metavar'] or 'value'}, not {shortened(' '.join(words)) or 'none'}"
        )
    if parse:
        try:
            return parse(words[0])
        except ValueError as error:
            raise ValueError(f": {quoted(words[0])} {error}") from None
    return _single(entry, words[0], hint)


def _single(entry: Field[Any], word: str, hint: Any) -> Any:
    if hint is Path:
        return Path(word)
    try:
        value = coerce(word, hint)
    except ValueError:
        raise ValueError(f": {quoted(word)} is not {expected(hint)}") from None
    at_least = entry.metadata["at_least"]
    if at_least is not None and value < at_least:
        raise ValueError(f": {word} is below {at_least}")
    return value


def _switch(words: Sequence[str]) -> bool:
    if not words:
        return True
    try:
        return coerce(words[0] if len(words) == 1 else list(words), bool)
    except ValueError:
        raise ValueError(f": {quoted(' '.join(words))} is not {expected(bool)}; alone it is true") from None


def _text(name: str, words: Sequence[str], problems: list[str]) -> str:
    if not words and _described()[name][1] == expected(bool):
        return "true"
    if len(words) != 1:
        problems.append(f"command line: --{name} takes one value, not {shortened(' '.join(words)) or 'none'}")
    return words[0] if words else ""


def _unknown(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"unknown option --{shortened(name)}; " + (
        f"did you mean --{nearest[0]}?" if nearest else "--help lists all"
    )


def _yaml(word: str, is_text: bool) -> Any:
    try:
        value = load_yaml(word) if word else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        return word  # not YAML, such as a bare `train[:10%]` or `@x`
    # A text with a colon and a name such as 010 stay as they were written.
    stays = (isinstance(value, dict) and not word.startswith("{")) or (is_text and type(value) in (int, float))
    return word if stays else value


def _without_none(hint: Any) -> Any:
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return members[0] if is_union and len(members) == 1 else hint


def _kind(hint: Any, entry: Field[Any]) -> str:
    """Return how --help names the type of an option; empty where its text says it."""
    hint = _without_none(hint)
    if hint in (bool, str, Path) or entry.metadata["parse"] or typing.get_origin(hint) is tuple:
        return ""
    return expected(hint)


def _default(entry: Field[Any]) -> str:
    if entry.default is REQUIRED:
        return "required"
    if entry.metadata["shown"] is not None:
        return entry.metadata["shown"]
    return "" if entry.default in (None, False, ()) else str(entry.default)


def _described() -> dict[str, tuple[str, str, str]]:
    """Return help text, type and default of each recipe key of ours, by its name."""
    found = {name: (text, expected(bool), "") for name, text in TRAINING_KEYS.items()}
    for group in GROUPS.values():
        hints = typing.get_type_hints(group)
        for entry in fields(group):
            default = "" if entry.default in (None, MISSING) else str(entry.default)
            found[entry.name] = entry.metadata["help"], expected(hints[entry.name]), default
    return found


def _all_keys() -> Iterator[str]:
    """Yield the lines of all recipe keys: ours by group, then the keys of TRL's `SFTConfig`."""
    from qwen_vl_sft.config.reading import key_hints, training_default

    described, ours = _described(), set()
    for title, group in GROUPS.items():
        yield from ("", title)
        for entry in fields(group):
            ours.add(entry.name)
            yield from _line(f"--{entry.name}", *described[entry.name])
    yield from ("", "Training: fields of TRL's SFTConfig and transformers' TrainingArguments")
    for name, hint in key_hints().items():
        if name not in ours:
            default = training_default(name)
            shown = "" if default is None else str(getattr(default, "value", default))
            yield from _line(f"--{name}", "", expected(hint), shown)


def _line(name: str, text: str, kind: str = "", default: str = "") -> list[str]:
    """Format an entry, indented; the text starts on the line of the name if there is room."""
    if kind:
        text = f"{text} ({kind})" if text else kind
    text = f"{text} [{default}]" if default else text
    margin = " " * TEXT_COLUMN
    first = f"  {name:<{TEXT_COLUMN - 2}}" if len(name) < TEXT_COLUMN - 2 else f"  {name}\n{margin}"
    wrapped = textwrap.wrap(text, WIDTH - TEXT_COLUMN - 1) or [""]
    return [(first + wrapped[0]).rstrip(), *(margin + line for line in wrapped[1:])]
