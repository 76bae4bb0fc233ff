"""Which tails are stored: what of a slot belongs to a page boundary, under a budget of its own.

A tail is the last W - 1 inputs of every convolution at one position, and the recurrent state there
if the model has one. Its name is the key of the page that ends there; one that is copied before the
last token of that page is known gets its name later. Tails come and go apart from pages; one whose
pages are gone is found by nobody and falls out in its turn.
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
        self._nameless: set[TailId] = set()

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
        if key in self._tails:
            self.touch(key)
            return None
        tail = self._take()
        if tail is not None:
            self._tails[key] = tail
        return tail

    def store_nameless(self) -> TailId | None:
        """A place for a new tail that `name` or `discard` is called for later."""
        tail = self._take()
        if tail is not None:
            self._nameless.add(tail)
        return tail

    def name(self, tail: TailId, key: Key) -> bool:
        """Names a nameless tail; False, giving it up, if there is one of that name already."""
        if key in self._tails:
            self.touch(key)
            self.discard(tail)
            return False
        self._nameless.remove(tail)
        self._tails[key] = tail
        return True

    def discard(self, tail: TailId) -> None:
        """Gives up a nameless tail."""
        self._nameless.remove(tail)
        self._free.append(tail)

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
        everything = sorted([*self._free, *self._nameless, *self._tails.values()])
        assert everything == list(range(self.num_tails)), "tails lost or twice"

    def _take(self) -> TailId | None:
        if not self._free and self._tails:
            _, evicted = self._tails.popitem(last=False)
            self._free.append(evicted)
            self.num_evicted += 1
        return self._free.pop() if self._free else None
