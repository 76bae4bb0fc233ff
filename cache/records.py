"""What the books are asked for and what they answer: plain records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheSizes:
    """How much state there is room for."""

    num_pages: int
    page_size: int
    """Tokens per page."""
    num_slots: int
    ring_len: int
    num_tails: int = 0
    """Conv windows that can be stored at page boundaries."""

    @property
    def capacity(self) -> int:
        """Tokens that fit in the page pool."""
        return self.num_pages * self.page_size


@dataclass(frozen=True)
class Admission:
    """Where an admitted sequence starts."""

    start: int = 0
    """First position to compute; 0 < start < shared means the rows in between are a replay."""
    shared: int = 0
    """Positions whose keys and values are shared with others; never written."""

    @property
    def num_cached(self) -> int:
        """Tokens that the cache spared, a short replay before their end apart."""
        return self.shared if self.start else 0

    @property
    def num_replayed(self) -> int:
        """Cached tokens that are run again for their conv windows."""
        return self.num_cached and self.shared - self.start
