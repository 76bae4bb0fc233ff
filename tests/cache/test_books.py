"""Random admissions, steps, forks, releases and resets: the books over pages, slots and tails never
lie, and everybody reads the state of their own tokens. A page with two owners that both write, a
prefix that is not what its key says, or a window from another position is one user's text in
another's answer; what is never given back is a server that slowly stops."""

from __future__ import annotations

import math

import torch
from convserve.cache import (
    AttentionSpec,
    CacheManager,
    CacheSizes,
    CacheStorage,
    ConvSpec,
    LayerSpec,
    RecurrentSpec,
    StateSpec,
    manager,
)
from convserve.cache.pools import SequenceId
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

SIZES = CacheSizes(num_pages=12, page_size=4, num_slots=5, ring_len=4, num_tails=3)
WIDTH = 4
REPLAY = 6
SPEC = StateSpec(
    (LayerSpec(AttentionSpec(1, 1), {"qkv": ConvSpec(1, WIDTH)}),), torch.float64, REPLAY
)
RECURRENT_SPEC = StateSpec(
    (LayerSpec(AttentionSpec(1, 1), {"qkv": ConvSpec(1, WIDTH)}, RecurrentSpec(1, 1, 2)),),
    torch.float64,
    None,
)
WINDOWED_SPEC = StateSpec(
    (LayerSpec(AttentionSpec(1, 1, window=6), {"qkv": ConvSpec(1, WIDTH)}),), torch.float64, REPLAY
)
CPU = torch.device("cpu")


class CacheBooks(RuleBasedStateMachine):
    """Random admissions, steps, forks, releases and resets over real storage.

    The value stored for a position is a number that stands for all tokens up to it, so that any
    state that does not belong to exactly those tokens is told apart. Prompts are few and alike, so
    that prefixes are shared all the time.
    """

    spec = SPEC
    num_tails = SIZES.num_tails

    def __init__(self) -> None:
        super().__init__()
        sizes = CacheSizes(12, 4, 5, 4, self.num_tails)
        self.replay_length = self.spec.replay_length
        self.cache = CacheManager(sizes, replay_length=self.replay_length, window=self.spec.window)
        self.storage = CacheStorage(self.spec, sizes, CPU, poison=True)
        self.tokens: dict[SequenceId, list[int]] = {}
        self.computed: dict[SequenceId, int] = {}
        self.written: dict[SequenceId, int] = {}
        """Where the ring stands: past `computed` when a draft was taken back."""
        self.exact_from: dict[SequenceId, int] = {}
        self.codes: dict[tuple[str, tuple[int, ...]], float] = {}
        self.salts: dict[SequenceId, str] = {}
        self.ids = 0

    def code(self, seq: SequenceId, position: int) -> float:
        prefix = (self.salts[seq], tuple(self.tokens[seq][: position + 1]))
        return self.codes.setdefault(prefix, float(len(self.codes)))

    def check_window(self, seq: SequenceId, position: int) -> None:
        ring = self.storage.layers[0].rings["qkv"][self.cache.slot(seq)]
        for p in range(max(0, position - WIDTH + 1), position):
            assert float(ring[p % SIZES.ring_len]) == self.code(seq, p)

    def step(self, seq: SequenceId, stop: int) -> None:
        """Computes the sequence up to `stop`, as a forward pass and its commit would."""
        self.forward(seq, stop)
        self.cache.commit(seq, self.tokens[seq], stop)

    def forward(self, seq: SequenceId, stop: int) -> None:
        self.storage.apply(self.cache.take_copies())
        start = self.computed[seq]
        shared, exact_from = self.cache.shared(seq), self.exact_from[seq]
        if start >= exact_from:
            self.check_window(seq, start)
        self.cache.check_writable(seq, max(start, shared), stop)
        layer = self.storage.layers[0]
        assert layer.k_pages is not None
        for p in range(start, stop):
            if p >= shared:
                page = self.cache.pages(seq)[p // SIZES.page_size]
                layer.k_pages[page, 0, p % SIZES.page_size, 0] = self.code(seq, p)
            value = self.code(seq, p) if p >= exact_from - WIDTH + 1 else math.nan
            layer.rings["qkv"][self.cache.slot(seq), p % SIZES.ring_len, 0] = value
        if layer.recurrent is not None:
            state = layer.recurrent[self.cache.slot(seq)]
            assert start == 0 or state.eq(self.code(seq, start - 1)).all()
            state.fill_(self.code(seq, stop - 1))
        self.computed[seq] = self.written[seq] = stop

    @rule(
        prompt=st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=30),
        reserve=st.integers(0, 3),
        salt=st.sampled_from(["", "", "other"]),
        chunk=st.integers(1, 30),
    )
    def admit(self, prompt: list[int], reserve: int, salt: str, chunk: int) -> None:
        self.ids += 1
        seq, free = SequenceId(self.ids), self.cache.free_pages
        admission = self.cache.admit(seq, prompt, salt=salt, reserve=reserve)
        if admission is None:
            needed = -(-len(prompt) // SIZES.page_size)
            assert needed + reserve > free or not self.cache.free_slots or free < 12
            assert self.cache.free_pages == free
            return
        assert admission.start <= admission.shared < len(prompt)
        assert admission.shared % SIZES.page_size == 0
        self.tokens[seq], self.salts[seq] = prompt, salt
        self.computed[seq] = admission.start
        self.storage.apply(self.cache.take_copies())
        if admission.start == 0:
            self.exact_from[seq] = 0
        elif self.replay_length is None or admission.shared - admission.start < REPLAY:
            self.exact_from[seq] = admission.start
            self.check_window(seq, admission.start)
        else:
            # Either a tail was loaded just there, or the rows in between make windows exact.
            self.exact_from[seq] = admission.shared
        self.step(seq, min(len(prompt), admission.start + chunk))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), rows=st.integers(1, 9))
    def advance(self, data: st.DataObject, rows: int) -> None:
        """The rest of the prompt in chunks, then generated tokens."""
        seq = data.draw(st.sampled_from(sorted(self.tokens)))
        tokens = self.tokens[seq]
        if self.computed[seq] == len(tokens):
            rows = 1
            if not self.cache.extend(seq, len(tokens) + 1):
                return
            tokens.append(data.draw(st.sampled_from([0, 1])))
        self.step(seq, min(len(tokens), self.computed[seq] + rows))

    @precondition(lambda self: any(self.computed[s] == len(t) for s, t in self.tokens.items()))
    @rule(data=st.data(), new=st.lists(st.sampled_from([0, 1]), min_size=2, max_size=2))
    def generate_ahead(self, data: st.DataObject, new: list[int]) -> None:
        """Each step is launched before the token of the one before it is known."""
        ready = [s for s, t in self.tokens.items() if self.computed[s] == len(t)]
        seq = data.draw(st.sampled_from(sorted(ready)))
        known = len(self.tokens[seq])
        if not self.cache.extend(seq, known + 2):
            return
        self.tokens[seq] += new
        for stop in (known + 1, known + 2):
            self.forward(seq, stop)
            self.cache.foresee(seq, stop)
            if stop > known + 1:
                self.cache.commit(seq, self.tokens[seq][: known + 1], known + 1, ahead=1)
        self.cache.commit(seq, self.tokens[seq], known + 2)

    @precondition(lambda self: any(self.computed[s] == len(t) for s, t in self.tokens.items()))
    @precondition(lambda self: self.replay_length is not None)
    @rule(data=st.data(), draft=st.sampled_from([0, 1]))
    def take_a_draft_back(self, data: st.DataObject, draft: int) -> None:
        """A step computes one token too many; the next one writes over it."""
        ready = [s for s, t in self.tokens.items() if self.computed[s] == len(t)]
        seq = data.draw(st.sampled_from(sorted(ready)))
        kept = len(self.tokens[seq]) + 1
        if not self.cache.extend(seq, kept + 1):
            return
        self.tokens[seq] += [1, draft]
        self.forward(seq, kept + 1)
        del self.tokens[seq][kept:]
        self.computed[seq] = kept
        self.cache.commit(seq, self.tokens[seq], kept, ahead=1)

    @precondition(lambda self: any(self.computed[s] == len(t) for s, t in self.tokens.items()))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        ready = [s for s, t in self.tokens.items() if self.computed[s] == len(t)]
        # What a draft wrote over is gone from a ring that can take one token back.
        ready = [s for s in ready if self.written[s] == self.computed[s]]
        if not ready:
            return
        parent = data.draw(st.sampled_from(sorted(ready)))
        self.ids += 1
        child = SequenceId(self.ids)
        position = len(self.tokens[parent]) - 1
        if self.replay_length is None:
            assert not self.cache.fork(parent, child, position), "the state has moved on"
            position = len(self.tokens[parent])
            self.extend_by_one(parent)
        if len(self.tokens[parent]) > position and self.cache.fork(parent, child, position):
            self.tokens[child] = list(self.tokens[parent])
            self.salts[child] = self.salts[parent]
            self.computed[child] = self.written[child] = position
            self.exact_from[child] = 0
            if self.cache.extend(child, position + 1):
                self.step(child, position + 1)
            else:
                self.release_one(child)

    def extend_by_one(self, seq: SequenceId) -> None:
        if self.cache.extend(seq, len(self.tokens[seq]) + 1):
            self.tokens[seq].append(1)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_one(data.draw(st.sampled_from(sorted(self.tokens))))

    @rule()
    def reset(self) -> None:
        self.cache.reset_prefixes()
        assert self.cache.kept_pages == 0

    def release_one(self, seq: SequenceId) -> None:
        self.cache.release(seq)
        self.cache.release(seq)  # ending twice is no news
        del self.tokens[seq], self.computed[seq]

    @invariant()
    def books_add_up(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def everybody_reads_the_state_of_their_own_tokens(self) -> None:
        k = self.storage.layers[0].k_pages
        assert k is not None
        for seq in self.tokens:
            pages, done = self.cache.pages(seq), self.computed[seq]
            first = 0 if self.spec.window is None else max(0, done - self.spec.window + 1)
            for p in range(first, max(done, self.cache.shared(seq))):
                stored = float(k[pages[p // SIZES.page_size], 0, p % SIZES.page_size, 0])
                assert stored == self.code(seq, p)

    def teardown(self) -> None:
        for seq in list(self.tokens):
            self.release_one(seq)
        assert self.cache.free_pages == SIZES.num_pages
        assert self.cache.free_slots == SIZES.num_slots


class CacheBooksWithoutTails(CacheBooks):
    num_tails = 0


class CacheBooksOfWindowedModels(CacheBooks):
    """Pages that every layer's window has passed belong to others."""

    spec = WINDOWED_SPEC


class CacheBooksOfRecurrentModels(CacheBooks):
    """No replay can rebuild the state: a prefix is usable up to a stored tail and no further."""

    spec = RECURRENT_SPEC

    def __init__(self) -> None:
        super().__init__()
        manager.RECURRENT_STRIDE = 1

    def teardown(self) -> None:
        manager.RECURRENT_STRIDE = 4
        super().teardown()


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCacheBooks = CacheBooks.TestCase
TestCacheBooks.settings = SETTINGS
TestCacheBooksWithoutTails = CacheBooksWithoutTails.TestCase
TestCacheBooksWithoutTails.settings = SETTINGS
TestCacheBooksOfWindowedModels = CacheBooksOfWindowedModels.TestCase
TestCacheBooksOfWindowedModels.settings = SETTINGS
TestCacheBooksOfRecurrentModels = CacheBooksOfRecurrentModels.TestCase
TestCacheBooksOfRecurrentModels.settings = SETTINGS
