"""Which tails are stored: the conv windows at page boundaries, under a budget of their own.

A tail is the last W - 1 inputs of every convolution at one position. Its name is the key of the
page that ends there. Tails come and go apart from pages; one whose pages are gone is found by
nobody and falls out in its turn.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .pools import TailId

if TYPE_CHECKING:
    from .prefix import Key


class TailPool:
    """Tail ids 0 .. num_tails - 1 by key, least recently used first out."""

    def __init__(self, num_tails: int) -> None:
        self.num_tails = num_tails
        self.num_evicted = 0
        """Tails that made room for others, since the start."""
        self._free = [TailId(t) for t in reversed(range(num_tails))]
        self._tails: OrderedDict[Key, TailId] = OrderedDict()

    @property
    def num_stored(self) -> int:
        """Tails that are stored now."""
        return len(self._tails)

    def find(self, key: Key) -> TailId | None:
        """The tail at the end of the page with this key."""
        return self._tails.get(key)

    def touch(self, key: Key) -> None:
        """Makes a stored tail the last to be evicted."""
        self._tails.move_to_end(key)

    def store(self, key: Key) -> TailId | None:
        """A place for a new tail; None if it is there already or there is no room at all."""
        if self.num_tails == 0:
            return None
        if key in self._tails:
            self.touch(key)
            return None
        if not self._free:
            _, evicted = self._tails.popitem(last=False)
            self._free.append(evicted)
            self.num_evicted += 1
        tail = self._tails[key] = self._free.pop()
        return tail

    def drop(self, key: Key) -> None:
        """Forgets a tail if it is stored."""
        tail = self._tails.pop(key, None)
        if tail is not None:
            self._free.append(tail)

    def clear(self) -> None:
        """Forgets every tail."""
        self._free += self._tails.values()
        self._tails.clear()

    def check(self) -> None:
        """Raises AssertionError unless every tail is free or stored, once."""
        everything = sorted([*self._free, *self._tails.values()])
        assert everything == list(range(self.num_tails)), "tails lost or twice"
