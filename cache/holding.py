"""What one sequence owns, and what was found cached for it: records of the manager's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .records import Admission

if TYPE_CHECKING:
    from .pools import PageId, SlotId, TailId
    from .prefix import Key


@dataclass
class Holding:
    """What one sequence owns."""

    slot: SlotId
    pages: list[PageId]
    number: int
    shared: int
    keys: list[Key]
    """Keys of the first pages, as far as they are known to be full."""
    root: Key
    cuts: list[int] = field(default_factory=list)
    """Boundaries, ascending, where a tail is worth a step of its own: where others branched off,
    and in recurrent models the last one that another prompt like this could start from."""
    rolling: Key | None = None
    """The sequence's own latest tail, which its next one replaces."""
    num_computed: int = 0
    """Tokens whose state is computed, as far as known."""
    nameless: tuple[int, TailId] | None = None
    """(position, tail) saved before the last token there is known."""
    passed: int = 0
    """Pages at the beginning that every layer's window has passed: they are given back, and stay in
    the table, where nobody sees more of them than that their contents are finite."""


@dataclass
class Match:
    """The longest usable cached prefix of a prompt, and how its end is reached."""

    pages: list[PageId] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    admission: Admission = field(default_factory=Admission)
    tail: tuple[Key, TailId] | None = None
    matched: int = 0
    """Tokens in cached pages, whether usable or not."""
