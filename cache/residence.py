"""How long pages of cached prefixes stay, lie idle and come back: figures for sizing the pool.

Knows nothing of tokens or of who owns a page. Every page counts and nothing is sampled: a page is
two stamps, and the pages of one prompt are counted together.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .pools import PageId

# fmt: off
PAGE_TIME_EDGES = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0,
    120.0, 300.0, 600.0, 1200.0, 1800.0,
)
# fmt: on
"""Seconds; a longer time falls into one last bin."""


@dataclass
class Times:
    """A histogram since the start."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(PAGE_TIME_EDGES) + 1))
    """By bin; a time that equals an edge belongs below it."""
    seconds: float = 0.0
    """Sum of all times."""

    def add(self, seconds: float, times: int = 1) -> None:
        """Counts one time, or several equal ones."""
        self.counts[bisect.bisect_left(PAGE_TIME_EDGES, seconds)] += times
        self.seconds += seconds * times


class Residence:
    """When each page was indexed and last used. Use is being indexed, shared or given up."""

    def __init__(self, num_pages: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._indexed_at = [0.0] * (num_pages + 1)
        self._used_at = [0.0] * (num_pages + 1)
        self.lifetimes = Times()
        """Indexed to evicted."""
        self.idle_times = Times()
        """Last use to eviction."""
        self.reuse_gaps = Times()
        """Last use to being shared with one more sequence."""

    def index(self, page: PageId) -> None:
        """A page is full and its prefix may be shared from now on."""
        self._indexed_at[page] = self._used_at[page] = self._clock()

    def share(self, pages: Sequence[PageId]) -> None:
        """Another sequence begins with what these pages hold."""
        now, used_at = self._clock(), self._used_at
        for stamp, count in Counter([used_at[page] for page in pages]).items():
            self.reuse_gaps.add(now - stamp, count)
        self._use(pages, now)

    def give_up(self, pages: Sequence[PageId]) -> None:
        """One of the owners of these pages needs them no more."""
        self._use(pages, self._clock())

    def evict(self, page: PageId) -> None:
        """A page is taken for other tokens."""
        now = self._clock()
        self.lifetimes.add(now - self._indexed_at[page])
        self.idle_times.add(now - self._used_at[page])

    def _use(self, pages: Sequence[PageId], now: float) -> None:
        used_at = self._used_at
        for page in pages:
            used_at[page] = now
