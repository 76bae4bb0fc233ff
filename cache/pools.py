"""Ids of pages and slots: who is free, who is owned, by how many. Knows nothing of contents."""

from __future__ import annotations

from typing import NewType

PageId = NewType("PageId", int)
SlotId = NewType("SlotId", int)
SequenceId = NewType("SequenceId", int)

RESERVED = 0
"""Page 0 and slot 0 belong to padding and are never handed out."""


class PagePool:
    """Reference-counted page ids 1 .. num_pages. Page 0 is reserved for padding."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # Popped from the end, so that low ids go first and a short run touches little memory.
        self._free = [PageId(p) for p in range(num_pages, RESERVED, -1)]
        self._owners = [0] * (num_pages + 1)

    @property
    def num_free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[PageId]:
        """Hands out `count` pages with one owner each; the caller has checked `num_free`."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, page: PageId) -> None:
        """Adds an owner to an owned page."""
        assert self._owners[page] > 0, f"page {page} has no owner to share with"
        self._owners[page] += 1

    def drop(self, page: PageId) -> None:
        """Removes an owner; the last one frees the page."""
        assert self._owners[page] > 0, f"page {page} dropped more often than owned"
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free.append(page)

    def owners(self, page: PageId) -> int:
        """How many sequences own the page."""
        return self._owners[page]

    def check(self, expected_owners: dict[PageId, int]) -> None:
        """Raises AssertionError unless exactly these pages are owned, this often."""
        owned = {PageId(p): n for p, n in enumerate(self._owners) if n}
        assert owned == expected_owners, f"owners {owned}, expected {expected_owners}"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & owned.keys(), "a page is free and owned"
        assert RESERVED not in free, "the reserved page is free"
        assert len(free) + len(owned) == self.num_pages, "pages lost"


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
