"""Values of YAML and the command line as the types that dataclass fields declare."""

from __future__ import annotations

import enum
import json
import types
import typing
from typing import Any

import yaml


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. Raises `ValueError` whose text says what was expected."""
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
    """How a message names the values that `hint` takes."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = _told_apart(typing.get_args(hint))
        return " or ".join(dict.fromkeys(expected(member) for member in members))
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if origin is list or hint is list:
        return "a list"
    if _is_mapping(hint):
        return "a mapping"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))


def load_yaml(text: str) -> Any:
    """Parse YAML, refusing a key that stands twice, which plain YAML would silently let win."""
    return yaml.load(text, Loader=_StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise ValueError(f"key {key!r} stands twice, in lines {seen[key]} and {line}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


# A date stays the text that it is, the name of a branch or of a run; no key takes another kind of date.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


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
    """The types of a union that say something: `Enum | str` and `dict | str` only say that text may stand for the first."""
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
    # YAML 1.1 reads 2e-4 as text: its floats need a dot.
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
