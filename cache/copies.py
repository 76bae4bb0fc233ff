"""Contents to move before a step: decided by the books, carried out by the storage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pools import PageId, SlotId, TailId


@dataclass(frozen=True)
class Copies:
    """Moves that happen all at once: every source is read before any target is written."""

    pages: list[tuple[PageId, PageId]] = field(default_factory=list)
    """(from, to): a partial page that gets a second owner."""
    slots: list[tuple[SlotId, SlotId]] = field(default_factory=list)
    """(from, to): everything in a slot."""
    saves: list[tuple[SlotId, int, TailId]] = field(default_factory=list)
    """(slot, position, tail): what a tail holds, at `position`, from slot to tail."""
    loads: list[tuple[TailId, SlotId, int]] = field(default_factory=list)
    """(tail, slot, position): the state at `position` from tail to slot."""

    def __bool__(self) -> bool:
        return bool(self.pages or self.slots or self.saves or self.loads)
