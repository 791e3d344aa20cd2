"""Convert values of YAML and the command line to the types that dataclass fields declare."""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from collections.abc import Collection, Hashable
from typing import Any

import yaml

from qwen_vl_sft.errors import quoted


def coerce(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`. Raises `ValueError` whose text says what was expected."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, typing.get_args(hint))
    if origin is typing.Literal:
        return _choice(value, list(typing.get_args(hint)))
    if origin is list or hint is list:
        item = (typing.get_args(hint) or (Any,))[0]
        return [coerce(entry, item) for entry in _as_list(value)]
    if _is_mapping(hint):
        return _mapping(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice(value, [member.value for member in hint])
    simple = {bool: _bool, int: _int, float: _float, str: _str}
    if hint in simple:
        return simple[hint](value)
    raise ValueError("cannot be set in a recipe")


def expected(hint: Any) -> str:
    """Return how a message names the values that `hint` takes."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = _told_apart(typing.get_args(hint))
        return " or ".join(dict.fromkeys(expected(member) for member in members))
    if origin is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(hint)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if origin is list or hint is list:
        return "a list"
    if _is_mapping(hint):
        return "a mapping"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))


def is_text(hint: Any) -> bool:
    """Return whether `hint` takes text and nothing else."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return str in members and set(members) <= {str, type(None)}


def load_yaml(text: str, text_keys: Collection[str] = ()) -> Any:
    """Parse YAML, refusing a key that is given twice: plain YAML silently keeps the last.

    A number under one of `text_keys` stays text as it is written: 010, 1.10 and 2024_05_01 are names there. Raises
    `ValueError` and `yaml.YAMLError`.
    """
    loader = _StrictLoader(text)
    try:
        root = loader.get_single_node()
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in text_keys and value.tag in _NUMBERS:
                value.tag = "tag:yaml.org,2002:str"
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ValueError(f"line {line}: merge keys (<<) are not read; write out the keys that they stand for")
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise ValueError(f"line {line}: a key is a word; put text with braces or brackets between quotes")
            if key in seen:
                raise ValueError(f"key {quoted(key)} is set twice, in lines {seen[key]} and {line}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


# A date stays the text that it is, the name of a branch or of a run; no key takes another kind of date.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1, which PyYAML reads, takes 1e-6 for text: its floats need a dot, and a sign before the exponent.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


def _one_of(value: Any, members: tuple[Any, ...]) -> Any:
    if value is None and type(None) in members:
        return None
    # Text last, since everything can be written as text.
    for member in sorted(_told_apart(members), key=lambda member: member is str):
        try:
            return coerce(value, member)
        except ValueError:
            continue
    raise ValueError("fits no type")


def _told_apart(members: tuple[Any, ...]) -> list[Any]:
    """Return the types of a union that matter: in `Enum | str` and `dict | str` the text only encodes the first."""
    members = tuple(member for member in members if member is not type(None))
    written = any(
        _is_mapping(member) or (isinstance(member, type) and issubclass(member, enum.Enum)) for member in members
    )
    return [member for member in members if not (written and member is str)]


def _is_mapping(hint: Any) -> bool:
    return dict in (hint, typing.get_origin(hint))


def _choice(value: Any, choices: list[Any]) -> Any:
    if value is False and "no" in choices:  # YAML reads a bare `no` as false
        return "no"
    # 1 equals True, so types must agree too.
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ValueError("is no choice")
    return value


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [entry.strip() for entry in value.split(",")]
    if not isinstance(value, list):
        raise ValueError("is no list")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError("is no mapping") from None
    if not isinstance(value, dict):
        raise ValueError("is no mapping")
    return value


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def _int(value: Any) -> int:
    number = _float(value)
    if number != int(number):
        raise ValueError("is no whole number")
    return int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("is no number")
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("is no finite number")
    return number


def _str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("is no text")
    return str(value)
