"""Which pages hold the state of which tokens: a content-addressed index of full pages.

The key of a page is a hash chained over everything before it: the key of the page before and the
page's own tokens, from a root made of the tenant's salt. Keys are 128 bits of blake2b, keyed with
a secret of this process so that nobody can construct a collision, and a match is believed only
when tokens and predecessor agree as well.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from typing import TYPE_CHECKING, NamedTuple, NewType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .pools import PageId

Key = NewType("Key", bytes)


class _Entry(NamedTuple):
    key: Key
    before: Key
    tokens: tuple[int, ...]


class PrefixIndex:
    """Full pages by the tokens they and all pages before them hold."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._secret = secrets.token_bytes(32)
        self._pages: dict[Key, PageId] = {}
        self._entries: dict[PageId, _Entry] = {}

    def root(self, salt: str) -> Key:
        """The key before the first page; prefixes under different salts never match."""
        return Key(hashlib.blake2b(salt.encode(), digest_size=16, key=self._secret).digest())

    def key(self, before: Key, tokens: Sequence[int]) -> Key:
        """The key of a page of `tokens` that follows the page with key `before`."""
        data = before + array("q", tokens).tobytes()
        return Key(hashlib.blake2b(data, digest_size=16, key=self._secret).digest())

    def lookup(self, root: Key, tokens: Sequence[int], most: int) -> tuple[list[PageId], list[Key]]:
        """The longest run of indexed pages, at most `most`, that hold the beginning of `tokens`.

        Returns:
            The pages, and their keys.
        """
        pages: list[PageId] = []
        keys: list[Key] = []
        before = root
        for i in range(most):
            part = tuple(tokens[i * self._page_size : (i + 1) * self._page_size])
            key = self.key(before, part)
            page = self._pages.get(key)
            if page is None or self._entries[page] != (key, before, part):
                break
            pages.append(page)
            keys.append(key)
            before = key
        return pages, keys

    def add(self, page: PageId, key: Key, before: Key, tokens: Sequence[int]) -> None:
        """Indexes a full page, unless another one with the same contents is indexed already."""
        if key not in self._pages:
            self._pages[key] = page
            self._entries[page] = _Entry(key, before, tuple(tokens))

    def remove(self, page: PageId) -> None:
        """Forgets a page."""
        del self._pages[self._entries.pop(page).key]

    def clear(self) -> None:
        """Forgets everything."""
        self._pages.clear()
        self._entries.clear()

    def __contains__(self, page: PageId) -> bool:
        return page in self._entries

    @property
    def indexed(self) -> set[PageId]:
        """Every page that a prefix leads to."""
        return set(self._entries)
