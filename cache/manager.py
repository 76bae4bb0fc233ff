"""The one door of the cache room: which pages and which slot each sequence owns, and which
prefixes are there to be shared.

The scheduler asks; nobody else writes the books. A sequence owns one ring slot from admission to
release, and pages that cover its positions from 0 on. State is addressed by position, so a
sequence that takes tokens back, retries a step or resumes a chunk changes nothing here.

A prefix of full pages that another sequence computed is shared, never written again. Its keys and
values are in the pages; the conv windows at its end come from a stored tail, or from *replay*: the
last tokens before it are run again, reading the cached keys and values and writing none. A finite
filter forgets, so after the model's replay length every window is exact whatever it held before.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .copies import Copies
from .pools import PageId, PagePool, SequenceId, SlotId, SlotPool
from .prefix import Key, PrefixIndex
from .tails import TailPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .pools import TailId


TAIL_STRIDE = 16
"""Pages between the boundaries of one sequence whose tails are not replaced by later ones."""


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


@dataclass
class _Holding:
    slot: SlotId
    pages: list[PageId]
    number: int
    shared: int
    keys: list[Key]
    """Keys of the first pages, as far as they are known to be full."""
    root: Key
    cut: int | None = None
    """A boundary where others branched off: a tail there is worth a step of its own."""
    rolling: Key | None = None
    """The sequence's own latest tail, which its next one replaces."""


@dataclass
class _Match:
    pages: list[PageId] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    admission: Admission = field(default_factory=Admission)
    tail: tuple[Key, TailId] | None = None


class CacheManager:
    """Books over pages, slots and tails. Every method leaves them consistent or changes nothing."""

    def __init__(
        self,
        sizes: CacheSizes,
        *,
        replay_length: int | None = 0,
        prefix_caching: bool = True,
    ) -> None:
        """
        Args:
            replay_length: see `StateSpec.replay_length`; None if only tails make a prefix usable.
            prefix_caching: whether prefixes are kept and shared between requests.
        """
        self.sizes = sizes
        self._replay_length = replay_length
        self._prefix_caching = prefix_caching
        self._index = PrefixIndex(sizes.page_size)
        self._pages = PagePool(sizes.num_pages, self._index.remove)
        self._slots = SlotPool(sizes.num_slots)
        self._tails = TailPool(sizes.num_tails if replay_length != 0 else 0)
        self._held: dict[SequenceId, _Holding] = {}
        self._admissions = itertools.count(1)
        self._copies = Copies()

    @property
    def free_pages(self) -> int:
        """Pages that a sequence could have: free ones, and kept ones that nobody owns."""
        return self._pages.num_available

    @property
    def kept_pages(self) -> int:
        """Pages that nobody owns and whose contents wait to be shared."""
        return self._pages.num_kept

    @property
    def free_slots(self) -> int:
        """Ring slots nobody owns."""
        return self._slots.num_free

    @property
    def tails(self) -> TailPool:
        """The stored tails; read only."""
        return self._tails

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.sizes.page_size)

    def admit(
        self,
        seq: SequenceId,
        tokens: Sequence[int],
        *,
        salt: str = "",
        reserve: int = 0,
        share: bool = True,
    ) -> Admission | None:
        """Gives a new sequence a slot, and pages for its tokens, shared as far as they are cached.

        Refuses (None), changing nothing, if that would leave fewer than `reserve` pages available.

        Args:
            salt: only prefixes computed under the same salt are shared.
            share: whether to look for a cached prefix at all.
        """
        assert seq not in self._held, f"sequence {seq} admitted twice"
        if not self._slots.num_free:
            return None
        root = self._index.root(salt)
        share = share and self._prefix_caching
        match = self._match(root, tokens) if share else _Match()
        fresh = self.pages_for(len(tokens)) - len(match.pages)
        revived = sum(not self._pages.owners(page) for page in match.pages)
        if fresh + revived + reserve > self._pages.num_available:
            return None
        for page in match.pages:
            self._pages.share(page)
        pages = match.pages + self._pages.take(fresh)
        slot = self._slots.take()
        admission = match.admission
        holding = self._hold(seq, slot, pages, admission.shared, match.keys, root)
        if match.tail is not None:
            key, tail = match.tail
            self._tails.touch(key)
            self._copies.loads.append((tail, slot, admission.start))
        if admission.start < admission.shared and self._tails.num_tails:
            holding.cut = admission.shared
        return admission

    def extend(self, seq: SequenceId, num_tokens: int) -> bool:
        """Makes the sequence's pages cover `num_tokens` tokens; refuses if too few are free."""
        holding = self._held[seq]
        needed = self.pages_for(num_tokens) - len(holding.pages)
        if needed > self._pages.num_available:
            return False
        if needed > 0:
            holding.pages += self._pages.take(needed)
        return True

    def commit(self, seq: SequenceId, tokens: Sequence[int], num_computed: int) -> None:
        """Takes note that the state of `tokens[:num_computed]` is computed and will not be taken
        back: full pages are indexed, and at a page boundary the conv windows are stored."""
        if not self._prefix_caching:
            return
        holding, size = self._held[seq], self.sizes.page_size
        keys = holding.keys
        while (len(keys) + 1) * size <= num_computed:
            i = len(keys)
            before = keys[-1] if keys else holding.root
            part = tokens[i * size : (i + 1) * size]
            key = self._index.key(before, part)
            self._index.add(holding.pages[i], key, before, part)
            keys.append(key)
        # Windows inside a replay are not exact; at its end they are.
        is_exact = num_computed > holding.shared or num_computed == holding.cut
        if num_computed % size == 0 and is_exact:
            self._save_tail(holding, num_computed)

    def fork(self, parent: SequenceId, child: SequenceId, position: int) -> bool:
        """Gives `child` the parent's state at `position`: full pages shared, a partial one copied.

        The parent may stand further on, by at most ring_len - (W - 1) tokens. Refuses, changing
        nothing, if it does not fit.
        """
        assert child not in self._held, f"sequence {child} admitted twice"
        size = self.sizes.page_size
        source = self._held[parent]
        full, partial = divmod(position, size)
        fresh = 1 if partial else 0
        if not self._slots.num_free or fresh > self._pages.num_available:
            return False
        shared = source.pages[:full]
        for page in shared:
            self._pages.share(page)
        own = self._pages.take(fresh)
        slot = self._slots.take()
        self._hold(child, slot, shared + own, full * size, source.keys[:full], source.root)
        self._copies.pages.extend((source.pages[full], page) for page in own)
        self._copies.slots.append((source.slot, slot))
        return True

    def release(self, seq: SequenceId) -> None:
        """Takes back everything the sequence owns; unknown sequences own nothing."""
        holding = self._held.pop(seq, None)
        if holding is None:
            return
        self._slots.drop(holding.slot)
        # Last pages first, so that a prefix is never evicted before what follows it.
        for page in reversed(holding.pages):
            self._pages.drop(page, keep=page in self._index)

    def reset_prefixes(self) -> None:
        """Forgets every prefix and tail; running sequences keep what they own."""
        self._index.clear()
        self._tails.clear()
        self._pages.forget_kept()
        for holding in self._held.values():
            holding.rolling = None

    def take_copies(self) -> Copies:
        """What must be copied before the next step, once."""
        taken, self._copies = self._copies, Copies()
        return taken

    def pages(self, seq: SequenceId) -> Sequence[PageId]:
        """The sequence's page table. Grows at its end while the sequence lives; do not keep."""
        return self._held[seq].pages

    def slot(self, seq: SequenceId) -> SlotId:
        """The sequence's ring slot."""
        return self._held[seq].slot

    def shared(self, seq: SequenceId) -> int:
        """Positions at the sequence's beginning whose keys and values it must not write."""
        return self._held[seq].shared

    def cut(self, seq: SequenceId) -> int | None:
        """A position that a chunk of the sequence should end at, if it would cross it."""
        return self._held[seq].cut

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

    def check_integrity(self) -> None:
        """Recomputes every derived count; raises AssertionError on a difference."""
        owners = Counter(page for held in self._held.values() for page in held.pages)
        self._pages.check(dict(owners), self._index.indexed)
        self._slots.check([held.slot for held in self._held.values()])
        self._tails.check()

    def _match(self, root: Key, tokens: Sequence[int]) -> _Match:
        """The longest usable cached prefix, and how its end is reached.

        The last token is always computed, for its logits.
        """
        size = self.sizes.page_size
        pages, keys = self._index.lookup(root, tokens, (len(tokens) - 1) // size)
        if not pages:
            return _Match()
        tail = None
        stored = 0
        for i in reversed(range(len(keys))):
            found = self._tails.find(keys[i])
            if found is not None:
                tail, stored = (keys[i], found), (i + 1) * size
                break
        if self._replay_length is None:
            count = stored // size
            shared = start = stored
        else:
            count = len(pages)
            shared = count * size
            start = max(stored, shared - self._replay_length, 0)
        if start != stored:
            tail = None
        return _Match(pages[:count], keys[:count], Admission(start, shared), tail)

    def _save_tail(self, holding: _Holding, position: int) -> None:
        """Stores the windows at a boundary. They stay where others branched off and on a stride;
        elsewhere the sequence's next ones replace them, so that its last ones remain."""
        pages = position // self.sizes.page_size
        key = holding.keys[pages - 1]
        stays = position == holding.cut or pages % TAIL_STRIDE == 0
        if position == holding.cut:
            holding.cut = None
        if holding.rolling is not None:
            self._tails.drop(holding.rolling)
            holding.rolling = None
        tail = self._tails.store(key)
        if tail is None:
            return
        saves = self._copies.saves
        saves[:] = [save for save in saves if save[2] != tail]  # what it evicted, just saved
        saves.append((holding.slot, position, tail))
        if not stays:
            holding.rolling = key

    def _hold(
        self,
        seq: SequenceId,
        slot: SlotId,
        pages: list[PageId],
        shared: int,
        keys: list[Key],
        root: Key,
    ) -> _Holding:
        number = next(self._admissions)
        holding = self._held[seq] = _Holding(slot, pages, number, shared, list(keys), root)
        return holding
