"""Ids of pages, slots and tails: who is free, who is owned, by how many. Knows no contents."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from collections.abc import Callable

PageId = NewType("PageId", int)
SlotId = NewType("SlotId", int)
TailId = NewType("TailId", int)
SequenceId = NewType("SequenceId", int)

RESERVED = 0
"""Page 0 and slot 0 belong to padding and are never handed out."""


class PagePool:
    """Reference-counted page ids 1 .. num_pages. Page 0 is reserved for padding.

    A page that nobody owns is free, or kept: its contents may be wanted again, and it is taken
    only when no page is free, the one kept longest first.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[PageId], None]) -> None:
        """`on_evict` hears of each kept page that is about to be handed out anew."""
        self.num_pages = num_pages
        # Popped from the end, so that low ids go first and a short run touches little memory.
        self._free = [PageId(p) for p in range(num_pages, RESERVED, -1)]
        self._kept: OrderedDict[PageId, None] = OrderedDict()
        self._owners = [0] * (num_pages + 1)
        self._on_evict = on_evict

    @property
    def num_available(self) -> int:
        """Pages that could be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages without an owner whose contents are kept."""
        return len(self._kept)

    def take(self, count: int) -> list[PageId]:
        """Hands out `count` pages with one owner each; the caller has checked `num_available`."""
        taken: list[PageId] = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                self._on_evict(page)
            self._owners[page] = 1
            taken.append(page)
        return taken

    def share(self, page: PageId) -> None:
        """Adds an owner to an owned or a kept page."""
        if self._owners[page] == 0:
            del self._kept[page]
        self._owners[page] += 1

    def drop(self, page: PageId, keep: bool = False) -> None:
        """Removes an owner. Without any, the page is kept or free."""
        assert self._owners[page] > 0, f"page {page} dropped more often than owned"
        self._owners[page] -= 1
        if self._owners[page] == 0:
            if keep:
                self._kept[page] = None
            else:
                self._free.append(page)

    def forget_kept(self) -> None:
        """Frees every kept page; nobody is told."""
        self._free += self._kept
        self._kept.clear()

    def owners(self, page: PageId) -> int:
        """How many sequences own the page."""
        return self._owners[page]

    def check(self, expected_owners: dict[PageId, int], indexed: set[PageId]) -> None:
        """Raises AssertionError unless exactly these pages are owned, this often, and every kept
        page is one of `indexed`."""
        owned = {PageId(p): n for p, n in enumerate(self._owners) if n}
        assert owned == expected_owners, f"owners {owned}, expected {expected_owners}"
        idle = [*self._free, *self._kept]
        assert len(set(idle)) == len(idle), "a page is free twice"
        assert not set(idle) & owned.keys(), "a page is free and owned"
        assert RESERVED not in idle, "the reserved page is free"
        assert len(idle) + len(owned) == self.num_pages, "pages lost"
        assert self._kept.keys() <= indexed, "a page is kept that no prefix leads to"
        assert not set(self._free) & indexed, "a free page is indexed"


class SlotPool:
    """Ring slots 1 .. num_slots, one owner each. Slot 0 is reserved for padding."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = [SlotId(s) for s in range(num_slots, RESERVED, -1)]

    @property
    def num_free(self) -> int:
        """Slots nobody owns."""
        return len(self._free)

    def take(self) -> SlotId:
        """Hands out a slot; the caller has checked `num_free`."""
        return self._free.pop()

    def drop(self, slot: SlotId) -> None:
        """Frees a slot."""
        assert slot not in self._free, f"slot {slot} freed twice"
        self._free.append(slot)

    def check(self, expected: list[SlotId]) -> None:
        """Raises AssertionError unless exactly these slots are owned."""
        everything = sorted([*expected, *self._free])
        assert everything == list(range(RESERVED + 1, self.num_slots + 1)), (
            f"owned {expected} and free {self._free} are not every slot once"
        )
