"""The one door of the cache room: which pages and which slot each sequence owns, and which
prefixes are there to be shared.

The scheduler asks; nobody else writes the books. A sequence owns one ring slot from admission to
release, and pages that cover its positions from 0 on. State is addressed by position, so a
sequence that takes tokens back, retries a step or resumes a chunk changes nothing here.

A prefix of full pages that another sequence computed is shared, never written again. Its keys and
values are in the pages; the conv windows at its end come from a stored tail, or from *replay*: the
last tokens before it are run again, reading the cached keys and values and writing none. A finite
filter forgets, so after the model's replay length every window is exact whatever it held before.

A recurrent state never forgets and moves on with every token. For a model that has one (replay
length None) a prefix is usable where a tail is stored and nowhere else, and a tail can be saved
only while the state stands at its position: chunks end where a tail is worth having.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import TYPE_CHECKING

from .copies import Copies
from .holding import Holding, Match
from .pools import PageId, PagePool, SequenceId, SlotId, SlotPool
from .prefix import Key, PrefixIndex
from .records import Admission
from .residence import Residence
from .tails import TailPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .pools import TailId
    from .records import CacheSizes


TAIL_STRIDE = 16
"""Pages between the boundaries of one sequence whose tails are not replaced by later ones."""

RECURRENT_STRIDE = 4
"""Pages between the boundaries where a generating sequence's recurrent state is stored: a copy is
as large as what a step reads and writes of the state."""


class CacheManager:
    """Books over pages, slots and tails. Every method leaves them consistent or changes nothing."""

    def __init__(
        self,
        sizes: CacheSizes,
        *,
        replay_length: int | None = 0,
        window: int | None = None,
        prefix_caching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            replay_length: see `StateSpec.replay_length`; None if only tails make a prefix usable.
            window: see `StateSpec.window`; pages behind it are given back.
            prefix_caching: whether prefixes are kept and shared between requests.
            clock: seconds, of the figures in `residence`.
        """
        self.sizes = sizes
        self._replay_length = replay_length
        self._window = window
        self._prefix_caching = prefix_caching
        self._index = PrefixIndex(sizes.page_size)
        self._pages = PagePool(sizes.num_pages, self._evict)
        self._slots = SlotPool(sizes.num_slots)
        self._tails = TailPool(sizes.num_tails if replay_length != 0 else 0)
        self._held: dict[SequenceId, Holding] = {}
        self._admissions = itertools.count(1)
        self._copies = Copies()
        self.residence = Residence(sizes.num_pages, clock)
        """How long cached pages stay; read only."""

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
        match = self._match(root, tokens) if share else Match()
        fresh = self.pages_for(len(tokens)) - len(match.pages)
        revived = sum(not self._pages.owners(page) for page in match.pages)
        if fresh + revived + reserve > self._pages.num_available:
            return None
        for page in match.pages:
            self._pages.share(page)
        self.residence.share(match.pages)
        pages = match.pages + self._pages.take(fresh)
        slot = self._slots.take()
        admission = match.admission
        holding = self._hold(seq, slot, pages, admission.shared, match.keys, root)
        if match.tail is not None:
            key, tail = match.tail
            self._tails.touch(key)
            self._copies.loads.append((tail, slot, admission.start))
        holding.num_computed = admission.start
        if self._tails.num_tails and self._prefix_caching:
            holding.cuts = self._cuts(match, len(tokens))
        return admission

    def extend(self, seq: SequenceId, num_tokens: int) -> bool:
        """Makes the sequence's pages cover `num_tokens` tokens; refuses if too few are free."""
        holding = self._held[seq]
        self._give_back_passed(holding)
        needed = -(-num_tokens // self.sizes.page_size) - len(holding.pages)
        if needed <= 0:
            return True
        if needed > self._pages.num_available:
            return False
        holding.pages += self._pages.take(needed)
        return True

    def commit(
        self, seq: SequenceId, tokens: Sequence[int], num_computed: int, ahead: int = 0
    ) -> None:
        """Takes note that the state of `tokens[:num_computed]` is computed and will not be taken
        back: full pages are indexed, and at a page boundary the conv windows are stored.

        Args:
            ahead: tokens after `num_computed` that steps launched so far have computed as well, at
                most ring_len - (W - 1), so that the windows are still in the ring.
        """
        holding, size = self._held[seq], self.sizes.page_size
        holding.num_computed = num_computed
        if not self._prefix_caching:
            return
        keys = holding.keys
        while (len(keys) + 1) * size <= num_computed:
            i = len(keys)
            before = keys[-1] if keys else holding.root
            part = tokens[i * size : (i + 1) * size]
            key = self._index.key(before, part)
            self._index.add(holding.pages[i], key, before, part)
            self.residence.index(holding.pages[i])
            keys.append(key)
        # Windows inside a replay are not exact; at its end they are.
        is_exact = num_computed > holding.shared or num_computed in holding.cuts
        if num_computed % size == 0 and is_exact:
            self._save_tail(holding, num_computed, ahead)

    def foresee(self, seq: SequenceId, num_computed: int) -> None:
        """Takes note that the step just planned computes the state up to `num_computed`, the last
        token of which is not known yet; `commit` follows when it is.

        A recurrent state will have moved on by then, so it is copied without a name.
        """
        pages, partial = divmod(num_computed, self.sizes.page_size)
        if self._replay_length is not None or not self._prefix_caching:
            return
        if partial or pages % RECURRENT_STRIDE:
            return
        holding = self._held[seq]
        self._drop_nameless(holding)
        tail = self._tails.store_nameless()
        if tail is not None:
            self._queue_save(holding, num_computed, tail)
            holding.nameless = (num_computed, tail)

    def fork(self, parent: SequenceId, child: SequenceId, position: int) -> bool:
        """Gives `child` the parent's state at `position`: full pages shared, a partial one copied.

        The parent may stand further on, by at most ring_len - (W - 1) tokens, or not at all if the
        model is recurrent. Refuses, changing nothing, if it stands elsewhere or it does not fit.
        """
        assert child not in self._held, f"sequence {child} admitted twice"
        size = self.sizes.page_size
        source = self._held[parent]
        full, partial = divmod(position, size)
        fresh = 1 if partial else 0
        if not self._slots.num_free or fresh > self._pages.num_available:
            return False
        if self._replay_length is None and source.num_computed != position:
            return False
        shared = source.pages[:full]
        for page in shared[source.passed :]:
            self._pages.share(page)
        own = self._pages.take(fresh)
        slot = self._slots.take()
        held = self._hold(child, slot, shared + own, full * size, source.keys[:full], source.root)
        held.num_computed, held.passed = position, min(source.passed, full)
        self._copies.pages.extend((source.pages[full], page) for page in own)
        self._copies.slots.append((source.slot, slot))
        return True

    def release(self, seq: SequenceId) -> None:
        """Takes back everything the sequence owns; unknown sequences own nothing."""
        holding = self._held.pop(seq, None)
        if holding is None:
            return
        self._drop_nameless(holding)
        self._slots.drop(holding.slot)
        owned = holding.pages[holding.passed :]
        self.residence.give_up(owned)
        # Last pages first, so that a prefix is never evicted before what follows it.
        for page in reversed(owned):
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
        held = self._held[seq]
        return next((cut for cut in held.cuts if cut > held.num_computed), None)

    def admission(self, seq: SequenceId) -> int:
        """A number that is new each time the sequence is admitted: within one, its page table only
        grows at its end; a preempted sequence comes back with another table."""
        return self._held[seq].number

    def check_writable(self, seq: SequenceId, start: int, stop: int) -> None:
        """Raises AssertionError if positions start..stop-1 are not covered by pages of its own."""
        holding = self._held[seq]
        size = self.sizes.page_size
        assert stop <= len(holding.pages) * size, f"sequence {seq} writes past its pages"
        for i in range(start // size, -(-stop // size)):
            page = holding.pages[i]
            assert self._pages.owners(page) == 1, f"sequence {seq} writes shared page {page}"

    def check_integrity(self) -> None:
        """Recomputes every derived count; raises AssertionError on a difference."""
        owners = Counter(page for held in self._held.values() for page in held.pages[held.passed :])
        self._pages.check(dict(owners), self._index.indexed)
        self._slots.check([held.slot for held in self._held.values()])
        self._tails.check()

    def _give_back_passed(self, holding: Holding) -> None:
        if self._window is None:
            return
        seen = max(0, holding.num_computed - self._window + 1)
        while (holding.passed + 1) * self.sizes.page_size <= seen:
            page = holding.pages[holding.passed]
            self.residence.give_up([page])
            self._pages.drop(page, keep=page in self._index)
            holding.passed += 1

    def _evict(self, page: PageId) -> None:
        self._index.remove(page)
        self.residence.evict(page)

    def _match(self, root: Key, tokens: Sequence[int]) -> Match:
        """The longest usable cached prefix, and how its end is reached.

        The last token is always computed, for its logits.
        """
        size = self.sizes.page_size
        pages, keys = self._index.lookup(root, tokens, (len(tokens) - 1) // size)
        if not pages:
            return Match()
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
        matched = len(pages) * size
        return Match(pages[:count], keys[:count], Admission(start, shared), tail, matched)

    def _cuts(self, match: Match, num_tokens: int) -> list[int]:
        """See `Holding.cuts`."""
        start, size = match.admission.start, self.sizes.page_size
        cuts = {match.matched}
        if self._replay_length is None:
            cuts.add((num_tokens - 1) // size * size)
        return sorted(cut for cut in cuts if cut > start)

    def _save_tail(self, holding: Holding, position: int, ahead: int) -> None:
        """Stores the tail of a boundary. It stays where others branched off and on a stride;
        elsewhere the sequence's next one replaces it, so that its last one remains."""
        pages = position // self.sizes.page_size
        key = holding.keys[pages - 1]
        is_cut = position in holding.cuts
        holding.cuts = [cut for cut in holding.cuts if cut > position]
        nameless = None
        if self._replay_length is None and not is_cut:
            if pages % RECURRENT_STRIDE:
                return
            if holding.nameless is not None and holding.nameless[0] == position:
                nameless, holding.nameless = holding.nameless[1], None
            elif ahead:
                return
        if holding.rolling is not None:
            self._tails.drop(holding.rolling)
            holding.rolling = None
        if nameless is not None:
            if not self._tails.name(nameless, key):
                return
        else:
            tail = self._tails.store(key)
            if tail is None:
                return
            self._queue_save(holding, position, tail)
        if not is_cut and pages % TAIL_STRIDE:
            holding.rolling = key

    def _queue_save(self, holding: Holding, position: int, tail: TailId) -> None:
        saves = self._copies.saves
        saves[:] = [save for save in saves if save[2] != tail]  # what it evicted, just saved
        saves.append((holding.slot, position, tail))

    def _drop_nameless(self, holding: Holding) -> None:
        if holding.nameless is not None:
            self._tails.discard(holding.nameless[1])
            holding.nameless = None

    def _hold(
        self,
        seq: SequenceId,
        slot: SlotId,
        pages: list[PageId],
        shared: int,
        keys: list[Key],
        root: Key,
    ) -> Holding:
        number = next(self._admissions)
        holding = self._held[seq] = Holding(slot, pages, number, shared, list(keys), root)
        return holding
