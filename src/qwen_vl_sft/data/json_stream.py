"""JSON values of a long text, one after another: read with a buffer no longer than the longest of them needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from qwen_vl_sft.errors import quoted

SPACE = " \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_BLOCK = 1 << 20


class JsonFault(ValueError):
    """A text that is no JSON; `line` counts from 1, `position` within it from 0."""

    def __init__(self, message: str, position: int, line: int = 1) -> None:
        super().__init__(message)
        self.position, self.line = position, line


def loads(text: str) -> Any:
    """Return the value of a text of one line. Raises `JsonFault`, also where an object holds a key twice."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise JsonFault(error.msg, error.pos) from None
    except (ValueError, RecursionError) as error:
        raise JsonFault(_told(error), 0) from None


def values(source: IO[str]) -> Iterator[tuple[str, Any, int]]:
    """Yield text, value and line of each value of a list, or of values that follow each other. Raises `JsonFault`."""
    text = _Text(source)
    is_list = text.next_character() == "["
    if is_list:
        text.advance(1)
    is_first = True
    while True:
        found = text.next_character()
        if (is_list and found == "]" and is_first) or (not is_list and not found):
            break
        line = text.line
        yield *text.value(), line
        is_first = False
        if not is_list:
            continue
        found = text.next_character()
        if found == "]":
            break
        if found != ",":
            raise text.fault("Expecting ',' delimiter")
        text.advance(1)
    if is_list:
        text.advance(1)
        if text.next_character():
            raise text.fault("Extra data")


class _Text:
    """A text that is read in blocks, and the place in it."""

    def __init__(self, source: IO[str]) -> None:
        self.source = source
        self.buffer, self.place, self.is_whole = "", 0, False
        self.line, self.column = 1, 0

    def next_character(self) -> str:
        """Pass spaces and return the character that follows, "" at the end."""
        while True:
            space = _SPACES.match(self.buffer, self.place)
            assert space is not None
            self.advance(space.end() - self.place)
            if self.place < len(self.buffer) or self.is_whole:
                return self.buffer[self.place : self.place + 1]
            self._refill(_BLOCK)

    def value(self) -> tuple[str, Any]:
        """Pass a value that begins here; return its text and itself. Raises `JsonFault`."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                if not self.is_whole:
                    self._refill(max(_BLOCK, len(self.buffer)))
                    continue
                self.advance(error.pos - self.place)
                raise self.fault(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.fault(_told(error)) from None
            text = self.buffer[self.place : end]
            self.advance(end - self.place)
            return text, value

    def advance(self, by: int) -> None:
        """Pass so many characters."""
        passed = self.buffer[self.place : self.place + by]
        if "\n" in passed:
            self.line, self.column = self.line + passed.count("\n"), len(passed) - passed.rfind("\n") - 1
        else:
            self.column += by
        self.place += by

    def fault(self, what: str) -> JsonFault:
        """Return the fault of this place."""
        return JsonFault(what, self.column, self.line)

    def _refill(self, size: int) -> None:
        more = self.source.read(size)
        self.buffer, self.place, self.is_whole = self.buffer[self.place :] + more, 0, not more


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds the key {quoted(twice)} twice")
    return found


def _told(error: BaseException) -> str:
    return "values are nested too deeply" if isinstance(error, RecursionError) else str(error)


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)
