"""The one door of the cache room: which pages and which slot each sequence owns.

The scheduler asks; nobody else writes the books. A sequence owns one ring slot from admission to
release, and pages that cover its positions from 0 on. State is addressed by position, so a
sequence that takes tokens back, retries a step or resumes a chunk changes nothing here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .pools import PageId, PagePool, SequenceId, SlotId, SlotPool

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class CacheSizes:
    """How much state there is room for."""

    num_pages: int
    page_size: int
    """Tokens per page."""
    num_slots: int
    ring_len: int

    @property
    def capacity(self) -> int:
        """Tokens that fit in the page pool."""
        return self.num_pages * self.page_size


@dataclass(frozen=True)
class Copies:
    """Contents to copy before the next step reads them: (source, destination) pairs."""

    pages: tuple[tuple[PageId, PageId], ...] = ()
    slots: tuple[tuple[SlotId, SlotId], ...] = ()


@dataclass
class _Holding:
    slot: SlotId
    pages: list[PageId]
    number: int


class CacheManager:
    """Books over pages and slots. Every method leaves them consistent or changes nothing."""

    def __init__(self, sizes: CacheSizes) -> None:
        self.sizes = sizes
        self._pages = PagePool(sizes.num_pages)
        self._slots = SlotPool(sizes.num_slots)
        self._held: dict[SequenceId, _Holding] = {}
        self._admissions = itertools.count(1)

    @property
    def free_pages(self) -> int:
        """Pages nobody owns."""
        return self._pages.num_free

    @property
    def free_slots(self) -> int:
        """Ring slots nobody owns."""
        return self._slots.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.sizes.page_size)

    def admit(self, seq: SequenceId, num_tokens: int, reserve: int = 0) -> bool:
        """Gives a new sequence a slot and pages for its first `num_tokens` tokens.

        Refuses, changing nothing, if that would leave fewer than `reserve` pages free.
        """
        assert seq not in self._held, f"sequence {seq} admitted twice"
        needed = self.pages_for(num_tokens)
        if not self._slots.num_free or needed + reserve > self._pages.num_free:
            return False
        self._hold(seq, self._slots.take(), self._pages.take(needed))
        return True

    def extend(self, seq: SequenceId, num_tokens: int) -> bool:
        """Makes the sequence's pages cover `num_tokens` tokens; refuses if too few are free."""
        holding = self._held[seq]
        needed = self.pages_for(num_tokens) - len(holding.pages)
        if needed > self._pages.num_free:
            return False
        if needed > 0:
            holding.pages += self._pages.take(needed)
        return True

    def fork(self, parent: SequenceId, child: SequenceId, position: int) -> Copies | None:
        """Gives `child` the parent's state at `position`: full pages shared, a partial one copied.

        The parent may stand further on, by at most ring_len - (W - 1) tokens. Returns what must
        be copied before the child's first step, or None, changing nothing, if it does not fit.
        """
        assert child not in self._held, f"sequence {child} admitted twice"
        size = self.sizes.page_size
        source = self._held[parent]
        full, partial = divmod(position, size)
        fresh = 1 if partial else 0
        if not self._slots.num_free or fresh > self._pages.num_free:
            return None
        shared = source.pages[:full]
        for page in shared:
            self._pages.share(page)
        own = self._pages.take(fresh)
        slot = self._slots.take()
        self._hold(child, slot, shared + own)
        copied = tuple((source.pages[full], page) for page in own)
        return Copies(pages=copied, slots=((source.slot, slot),))

    def release(self, seq: SequenceId) -> None:
        """Takes back everything the sequence owns; unknown sequences own nothing."""
        holding = self._held.pop(seq, None)
        if holding is None:
            return
        self._slots.drop(holding.slot)
        # Last pages first, so that the first ones are reused last.
        for page in reversed(holding.pages):
            self._pages.drop(page)

    def pages(self, seq: SequenceId) -> Sequence[PageId]:
        """The sequence's page table. Grows at its end while the sequence lives; do not keep."""
        return self._held[seq].pages

    def slot(self, seq: SequenceId) -> SlotId:
        """The sequence's ring slot."""
        return self._held[seq].slot

    def admission(self, seq: SequenceId) -> int:
        """A number that is new each time the sequence is admitted: within one, its page table only
        grows at its end; a preempted sequence comes back with another table."""
        return self._held[seq].number

    def check_writable(self, seq: SequenceId, start: int, stop: int) -> None:
        """Raises AssertionError if positions start..stop-1 are not covered by pages of its own."""
        holding = self._held[seq]
        size = self.sizes.page_size
        assert stop <= len(holding.pages) * size, f"sequence {seq} writes past its pages"
        for page in holding.pages[start // size : self.pages_for(stop)]:
            assert self._pages.owners(page) == 1, f"sequence {seq} writes shared page {page}"

    def _hold(self, seq: SequenceId, slot: SlotId, pages: list[PageId]) -> None:
        self._held[seq] = _Holding(slot, pages, next(self._admissions))

    def check_integrity(self) -> None:
        """Recomputes every derived count; raises AssertionError on a difference."""
        owners = Counter(page for held in self._held.values() for page in held.pages)
        self._pages.check(dict(owners))
        self._slots.check([held.slot for held in self._held.values()])
