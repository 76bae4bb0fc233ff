"""Finds tool calls in an answer's text as it arrives.

Knows nothing of tokens or of replies. What comes out does not depend on how the text was cut: the
pieces of a stream, put together, are those of the whole text.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

from .tools import CLOSE, OPEN

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([A-Za-z0-9_.-]{1,64})"\s*,\s*"arguments"\s*:\s*\{')
"""A call whose arguments can be told while they arrive."""
_BETWEEN = re.compile(r"[\s,\[\]]*")


class CallPiece(NamedTuple):
    """What is new of one call."""

    call: int
    """Its place among the calls of its answer."""
    call_id: str
    name: str | None
    """With the first piece of a call."""
    arguments: str


class ToolText:
    """Splits one answer into text and calls."""

    def __init__(self, names: frozenset[str], *, is_parallel: bool) -> None:
        """`names` may be called; a call of another name is text. With `is_parallel` false,
        whatever follows the first call is dropped."""
        self._names = names
        self._is_parallel = is_parallel
        self._text = ""
        """Arrived, and told neither as text nor as a call."""
        self._is_inside = False
        """`_text` is what follows an OPEN."""
        self._opening = ""
        """That OPEN and the spaces before it, for as long as no call was found after it."""
        self._object: _Object | None = None
        self.num_calls = 0
        """Calls told so far, the one that is being told included."""

    def push(self, text: str) -> list[str | CallPiece]:
        """Takes more text; returns what of it can be told."""
        self._text += text
        return list(self._told())

    def finish(self) -> list[str | CallPiece]:
        """The rest, when nothing more comes."""
        rest, self._text = self._text, ""
        if self._is_inside:
            if not self._opening:
                return []
            rest = self._opening + rest
        return [rest] if rest and (not self.num_calls or rest.strip()) else []

    def _told(self) -> Iterator[str | CallPiece]:
        while True:
            before = len(self._text), self._is_inside
            if self.num_calls and not self._is_parallel and self._object is None:
                self._text = ""
                return
            yield from self._inside() if self._is_inside else self._outside()
            if (len(self._text), self._is_inside) == before:
                return

    def _outside(self) -> Iterator[str]:
        start = self._text.find(OPEN)
        if start < 0:
            start = len(self._text) - _overlap(self._text, OPEN)
            following = self._text[start:]
        else:
            following = self._text[start + len(OPEN) :]
            self._is_inside = True
        text = self._text[:start]
        bare = text.rstrip()
        spaces = text[len(bare) :]  # told only if no call follows
        if self._is_inside:
            self._opening = spaces + OPEN
        else:
            following = spaces + following
        self._text = following
        if bare:
            yield bare

    def _inside(self) -> Iterator[str | CallPiece]:
        if self._object is None:
            gap = _BETWEEN.match(self._text)
            assert gap is not None
            rest = self._text[gap.end() :]
            if rest.startswith(CLOSE):
                self._text, self._is_inside = rest.removeprefix(CLOSE), False
                return
            if not rest or CLOSE.startswith(rest):
                return
            if not rest.startswith("{"):
                yield from self._give_up()
                return
            self._text = rest
            self._object = _Object()
        yield from self._read(self._object)

    def _read(self, found: _Object) -> Iterator[str | CallPiece]:
        found.read(self._text)
        if not found.is_told and found.head is not None and found.head[1] in self._names:
            self._start(found)
            yield CallPiece(found.index, found.call_id, found.head[1], "")
        if found.is_told:
            arguments = found.new_arguments(self._text)
            if arguments:
                yield CallPiece(found.index, found.call_id, None, arguments)
            if found.end is not None:
                self._text, self._object = self._text[found.end :], None
            return
        if found.end is None:
            return
        call = _call(self._text[: found.end], self._names)
        if call is None:
            self._object = None
            yield from self._give_up()
            return
        self._start(found)
        self._text, self._object = self._text[found.end :], None
        yield CallPiece(found.index, found.call_id, call[0], call[1])

    def _start(self, found: _Object) -> None:
        found.start_telling(self.num_calls)
        self.num_calls += 1
        self._opening = ""

    def _give_up(self) -> Iterator[str]:
        """What follows OPEN is no call: both are text."""
        opening, self._opening, self._is_inside = self._opening, "", False
        if opening:
            yield opening


class _Object:
    """One JSON object at the beginning of a growing text."""

    def __init__(self) -> None:
        self._read_to = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._told_to = 0
        self._arguments_end: int | None = None
        self.head: re.Match[str] | None = None
        self.end: int | None = None
        """One past its last character, once that is there."""
        self.is_told = False
        self.index = 0
        self.call_id = ""

    def read(self, text: str) -> None:
        """Reads on."""
        if self.head is None:
            self.head = _HEAD.match(text)
        for position in range(self._read_to, len(text)):
            char = text[position]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 1 and self._arguments_end is None:
                    self._arguments_end = position + 1
                if self._depth == 0:
                    self.end = position + 1
                    break
        self._read_to = len(text) if self.end is None else self.end

    def start_telling(self, index: int) -> None:
        """From now on its arguments are told as they come."""
        self.is_told = True
        self.index = index
        self.call_id = f"call_{secrets.token_hex(12)}"
        if self.head is not None:
            self._told_to = self.head.end() - 1

    def new_arguments(self, text: str) -> str:
        """Arguments that have arrived and were not told."""
        end = self._read_to if self._arguments_end is None else self._arguments_end
        new = text[self._told_to : end]
        self._told_to = max(end, self._told_to)
        return new


def _call(source: str, names: frozenset[str]) -> tuple[str, str] | None:
    """(name, arguments) of a call in whatever order, None if it is none."""
    try:
        call: Any = json.loads(source)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or name not in names:
        return None
    if isinstance(arguments, str):
        return name, arguments
    return name, json.dumps(arguments, ensure_ascii=False)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
