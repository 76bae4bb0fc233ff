"""The books over pages, slots and tails never lie: a page with two owners that both write, a
prefix that is not what its key says, or a window from another position is one user's text in
another's answer; what is never given back is a server that slowly stops."""

from __future__ import annotations

import math

import pytest
import torch
from convserve.cache import (
    AttentionSpec,
    CacheManager,
    CacheSizes,
    CacheStorage,
    ConvSpec,
    Copies,
    LayerSpec,
    RecurrentSpec,
    StateSpec,
    manager,
)
from convserve.cache.pools import PageId, PagePool, SequenceId, SlotId, SlotPool, TailId
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
        self.computed[seq] = stop

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
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        ready = [s for s, t in self.tokens.items() if self.computed[s] == len(t)]
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
            self.computed[child] = position
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


def run(cache: CacheManager, number: int, tokens: list[int], salt: str = "") -> tuple[int, int]:
    """Computes and releases a prompt; (start, shared) of its admission."""
    seq = SequenceId(number)
    admission = cache.admit(seq, tokens, salt=salt)
    assert admission is not None
    cache.commit(seq, tokens, len(tokens))
    cache.release(seq)
    return admission.start, admission.shared


def test_a_prefix_is_shared_up_to_its_last_full_page_and_replayed() -> None:
    cache = CacheManager(SIZES, replay_length=REPLAY)
    tokens = list(range(22))
    assert run(cache, 1, tokens) == (0, 0)
    assert run(cache, 2, [*tokens[:17], 99, 98]) == (16 - REPLAY, 16)
    assert run(cache, 3, tokens[:8]) == (0, 4)  # shorter than a replay: from the beginning
    assert run(cache, 4, [7, *tokens]) == (0, 0)


def test_the_last_token_is_always_computed() -> None:
    cache = CacheManager(SIZES, replay_length=0)
    tokens = list(range(8))
    run(cache, 1, tokens)
    assert run(cache, 2, tokens) == (4, 4)


def test_salts_separate_tenants() -> None:
    cache = CacheManager(SIZES, replay_length=0)
    run(cache, 1, list(range(9)), salt="a")
    assert run(cache, 2, list(range(9)), salt="b") == (0, 0)
    assert run(cache, 3, list(range(9)), salt="a") == (8, 8)


def test_what_follows_is_evicted_before_the_prefix_it_follows() -> None:
    cache = CacheManager(CacheSizes(4, 4, 2, 4), replay_length=0)
    run(cache, 1, list(range(16)))
    run(cache, 2, [50] * 8)  # takes two of the four kept pages
    assert run(cache, 3, [*range(8), 60]) == (8, 8)


def test_a_stored_tail_is_used_and_the_nearest_one_wins() -> None:
    cache = CacheManager(SIZES, replay_length=REPLAY)
    seq, tokens = SequenceId(1), list(range(23))
    cache.admit(seq, tokens)
    for stop in (4, 12, 23):
        cache.commit(seq, tokens, stop)
    saves = cache.take_copies().saves
    assert [position for _, position, _ in saves] == [12]  # its last one replaced the one before
    assert cache.tails.num_stored == 1
    cache.release(seq)
    assert run(cache, 2, tokens[:13]) == (12, 12)
    assert [position for _, _, position in cache.take_copies().loads] == [12]
    assert run(cache, 3, tokens[:17]) == (12, 16)  # nearer than a replay from 10
    assert run(cache, 4, tokens[:21]) == (14, 20)  # a replay is nearer


def test_where_others_branched_off_a_tail_is_worth_a_step() -> None:
    cache = CacheManager(SIZES, replay_length=REPLAY)
    run(cache, 1, list(range(21)))
    seq, tokens = SequenceId(2), [*range(12), 70, 71, 72, 73, 74]
    admission = cache.admit(seq, tokens)
    assert admission is not None
    assert (admission.start, admission.shared, cache.cut(seq)) == (6, 12, 12)
    cache.commit(seq, tokens, 8)  # inside the replay: not exact, not stored
    assert cache.take_copies().saves == []
    cache.commit(seq, tokens, 12)
    assert [position for _, position, _ in cache.take_copies().saves] == [12]
    assert cache.cut(seq) is None
    cache.commit(seq, tokens, 16)
    cache.release(seq)
    assert run(cache, 3, [*range(12), 80]) == (12, 12)


def test_reserved_ids_are_never_handed_out() -> None:
    pages, slots = PagePool(3, lambda _: None), SlotPool(3)
    assert sorted(pages.take(3)) == [1, 2, 3]
    assert sorted(slots.take() for _ in range(3)) == [1, 2, 3]


def test_a_page_dropped_too_often_is_caught() -> None:
    pool = PagePool(2, lambda _: None)
    (page,) = pool.take(1)
    pool.drop(page)
    with pytest.raises(AssertionError, match="dropped more often than owned"):
        pool.drop(page)


def test_a_slot_freed_twice_is_caught() -> None:
    pool = SlotPool(2)
    slot = pool.take()
    pool.drop(slot)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.drop(slot)


def test_a_sequence_admitted_again_has_a_new_number() -> None:
    """A page table cached under the old number would point at other sequences' pages."""
    cache = CacheManager(SIZES)
    cache.admit(SequenceId(1), [0] * 4)
    first = cache.admission(SequenceId(1))
    cache.release(SequenceId(1))
    cache.admit(SequenceId(1), [0] * 4)
    assert cache.admission(SequenceId(1)) != first


def test_writing_a_shared_page_is_caught() -> None:
    cache = CacheManager(SIZES)
    cache.admit(SequenceId(1), [0] * 9)
    cache.fork(SequenceId(1), SequenceId(2), 8)
    with pytest.raises(AssertionError, match="writes shared page"):
        cache.check_writable(SequenceId(2), 7, 8)


def test_copies_of_one_kind_happen_all_at_once() -> None:
    """A page freed by one sequence may be the target of another's copy in the same step."""
    storage = CacheStorage(SPEC, SIZES, CPU, poison=True)
    k, ring = storage.layers[0].k_pages, storage.layers[0].rings["qkv"]
    assert k is not None
    k[1], k[2], ring[1], ring[2] = 1.0, 2.0, 10.0, 20.0
    storage.apply(
        Copies(
            pages=[(PageId(1), PageId(2)), (PageId(2), PageId(3))],
            slots=[(SlotId(1), SlotId(2)), (SlotId(2), SlotId(3))],
        )
    )
    assert k[2].eq(1).all()
    assert k[3].eq(2).all()
    assert ring[2].eq(10).all()
    assert ring[3].eq(20).all()


def test_a_window_saved_in_a_step_can_be_loaded_in_it() -> None:
    storage = CacheStorage(SPEC, SIZES, CPU, poison=True)
    ring = storage.layers[0].rings["qkv"]
    ring[1, :, 0] = torch.tensor([4.0, 5.0, 2.0, 3.0])  # positions 2 .. 5 of a sequence
    saved = (SlotId(1), 6, TailId(0))
    storage.apply(Copies(saves=[saved], loads=[(TailId(0), SlotId(2), 6)]))
    assert ring[2, :, 0].nan_to_num(-1).tolist() == [4.0, 5.0, -1.0, 3.0]


@pytest.mark.parametrize(
    ("width", "taken_back", "expected"),
    [(0, 0, 1), (2, 0, 2), (3, 0, 4), (4, 0, 4), (5, 0, 8), (8, 0, 8), (4, 1, 4), (4, 5, 8)],
)
def test_ring_length(width: int, taken_back: int, expected: int) -> None:
    """A power of two that holds the window and everything a step may take back."""
    convs = {"qkv": ConvSpec(6, width)} if width else {}
    spec = StateSpec((LayerSpec(AttentionSpec(1, 2), convs),), torch.bfloat16, 0)
    assert spec.ring_len(taken_back) == expected
    assert spec.conv_bytes_per_sequence(expected) == (6 * expected * 2 if width else 0)
    assert spec.tail_bytes == (6 * (width - 1) * 2 if width else 0)
    assert spec.kv_bytes_per_token == 8


def test_a_recurrent_prefix_is_shared_up_to_its_snapshot() -> None:
    """Chunks end where the next prompt like this one could start, and where others branch off."""
    cache = CacheManager(SIZES, replay_length=None)
    seq, tokens = SequenceId(1), list(range(22))
    assert cache.admit(seq, tokens)
    assert cache.cut(seq) == 20
    cache.commit(seq, tokens, 20)
    assert cache.cut(seq) is None
    cache.commit(seq, tokens, 22)
    cache.release(seq)
    assert [position for _, position, _ in cache.take_copies().saves] == [20]
    assert run(cache, 2, [*tokens[:21], 99]) == (20, 20)
    branch, other = SequenceId(3), [*tokens[:9], 50, 51, 52, 53, 54, 55]
    admission = cache.admit(branch, other)
    assert admission is not None
    assert (admission.start, cache.cut(branch)) == (0, 8)
    cache.commit(branch, other, 8)
    assert cache.cut(branch) == 12
    cache.release(branch)
    assert run(cache, 4, [*tokens[:9], 60]) == (8, 8)


def test_a_snapshot_taken_before_its_last_token_is_known_is_found_under_it() -> None:
    cache = CacheManager(CacheSizes(12, 1, 5, 4, 3), replay_length=None)
    seq, tokens = SequenceId(1), [1, 2, 3]
    cache.admit(seq, tokens)
    cache.commit(seq, tokens, 3)
    cache.extend(seq, 5)
    cache.foresee(seq, 4)
    assert [position for _, position, _ in cache.take_copies().saves] == [4]
    cache.commit(seq, [*tokens, 4], 4, ahead=1)
    cache.release(seq)
    assert run(cache, 2, [1, 2, 3, 4, 5]) == (4, 4)
    cache.check_integrity()


@pytest.mark.parametrize("caching", [True, False])
def test_pages_behind_every_window_are_given_back(caching: bool) -> None:
    """A sequence of any length holds what its window covers, and is released whole."""
    sizes = CacheSizes(6, 4, 2, 4)
    cache = CacheManager(sizes, window=9, prefix_caching=caching)
    seq, tokens = SequenceId(1), list(range(100))
    assert cache.admit(seq, tokens[:1])
    for position in range(1, 100):
        cache.commit(seq, tokens, position)
        assert cache.extend(seq, position + 1)
        assert sizes.num_pages - cache.free_pages <= 4
        cache.check_integrity()
    cache.release(seq)
    assert cache.free_pages == sizes.num_pages


def test_only_what_no_layer_sees_is_behind_the_window() -> None:
    def window(*windows: int | None) -> int | None:
        layers = tuple(LayerSpec(AttentionSpec(1, 2, w)) for w in windows)
        return StateSpec((*layers, LayerSpec()), torch.float32, 0).window

    assert window(4, 9) == 9
    assert window(4, None) is None
    assert window() is None
