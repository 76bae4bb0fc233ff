"""The books over pages and slots never lie: a page with two owners that both write, or one that is
never given back, is one user's text in another's answer, or a server that slowly stops."""

from __future__ import annotations

import pytest
import torch
from convserve.cache import (
    AttentionSpec,
    CacheManager,
    CacheSizes,
    ConvSpec,
    Copies,
    LayerSpec,
    StateSpec,
    allocate,
    apply_copies,
)
from convserve.cache.pools import PageId, PagePool, SequenceId, SlotId, SlotPool
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

SIZES = CacheSizes(num_pages=12, page_size=4, num_slots=5, ring_len=4)


class CacheBooks(RuleBasedStateMachine):
    """Random admissions, extensions, forks and releases against a model of token positions.

    Every position of every sequence is written with a value of its own; forks copy as they are
    told. A sequence must always read back exactly what it, or its parent before the fork, wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = CacheManager(SIZES)
        self.memory: dict[tuple[PageId, int], int] = {}
        self.rings: dict[SlotId, int] = {}
        self.written: dict[SequenceId, list[int]] = {}
        self.ids = 0
        self.values = 0

    def write(self, seq: SequenceId, upto: int) -> None:
        tokens = self.written[seq]
        self.cache.check_writable(seq, len(tokens), upto)
        while len(tokens) < upto:
            self.values += 1
            page = self.cache.pages(seq)[len(tokens) // SIZES.page_size]
            self.memory[page, len(tokens) % SIZES.page_size] = self.values
            tokens.append(self.values)
        self.rings[self.cache.slot(seq)] = tokens[-1] if tokens else 0

    @rule(length=st.integers(1, 30), reserve=st.integers(0, 3))
    def admit(self, length: int, reserve: int) -> None:
        self.ids += 1
        seq, free = SequenceId(self.ids), self.cache.free_pages
        needed = -(-length // SIZES.page_size)
        fits = needed + reserve <= free and self.cache.free_slots > 0
        assert self.cache.admit(seq, length, reserve) == fits
        if fits:
            self.written[seq] = []
            self.write(seq, length)
        else:
            assert self.cache.free_pages == free

    @precondition(lambda self: self.written)
    @rule(data=st.data(), more=st.integers(1, 9))
    def extend(self, data: st.DataObject, more: int) -> None:
        seq = data.draw(st.sampled_from(sorted(self.written)))
        length = len(self.written[seq]) + more
        free = self.cache.free_pages
        if self.cache.extend(seq, length):
            self.write(seq, length)
        else:
            assert self.cache.free_pages == free

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.written)))
        position = len(self.written[parent]) - 1
        self.ids += 1
        child = SequenceId(self.ids)
        copies = self.cache.fork(parent, child, position)
        if copies is None:
            return
        for source, target in copies.pages:
            for offset in range(SIZES.page_size):
                if (source, offset) in self.memory:
                    self.memory[target, offset] = self.memory[source, offset]
        for source, target in copies.slots:
            self.rings[target] = self.rings[source]
        self.written[child] = self.written[parent][:position]
        if self.cache.extend(child, position + 1):
            self.write(child, position + 1)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.written)))
        self.cache.release(seq)
        self.cache.release(seq)  # ending twice is no news
        del self.written[seq]

    @invariant()
    def books_add_up(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def everybody_reads_their_own_tokens(self) -> None:
        for seq, tokens in self.written.items():
            pages = self.cache.pages(seq)
            read = [
                self.memory[pages[p // SIZES.page_size], p % SIZES.page_size]
                for p in range(len(tokens))
            ]
            assert read == tokens

    def teardown(self) -> None:
        for seq in list(self.written):
            self.cache.release(seq)
        assert self.cache.free_pages == SIZES.num_pages
        assert self.cache.free_slots == SIZES.num_slots


TestCacheBooks = CacheBooks.TestCase
TestCacheBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_reserved_ids_are_never_handed_out() -> None:
    pages, slots = PagePool(3), SlotPool(3)
    assert sorted(pages.take(3)) == [1, 2, 3]
    assert sorted(slots.take() for _ in range(3)) == [1, 2, 3]


def test_a_page_dropped_too_often_is_caught() -> None:
    pool = PagePool(2)
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
    cache.admit(SequenceId(1), 4)
    first = cache.admission(SequenceId(1))
    cache.release(SequenceId(1))
    cache.admit(SequenceId(1), 4)
    assert cache.admission(SequenceId(1)) != first


def test_writing_a_shared_page_is_caught() -> None:
    cache = CacheManager(SIZES)
    cache.admit(SequenceId(1), 9)
    cache.fork(SequenceId(1), SequenceId(2), 8)
    with pytest.raises(AssertionError, match="writes shared page"):
        cache.check_writable(SequenceId(2), 7, 8)


def test_copies_happen_all_at_once() -> None:
    """A page freed by one sequence may be the target of another's copy in the same step."""
    spec = StateSpec((LayerSpec(AttentionSpec(1, 2), {"qkv": ConvSpec(3, 4)}),), torch.float32, 3)
    state = allocate(spec, SIZES, torch.device("cpu"), poison=True)
    k, ring = state[0].k_pages, state[0].rings["qkv"]
    assert k is not None
    k[1], k[2], ring[1], ring[2] = 1.0, 2.0, 10.0, 20.0
    swap = Copies(
        pages=((PageId(1), PageId(2)), (PageId(2), PageId(3))),
        slots=((SlotId(1), SlotId(2)), (SlotId(2), SlotId(3))),
    )
    apply_copies(state, swap)
    assert k[2].eq(1).all()
    assert k[3].eq(2).all()
    assert ring[2].eq(10).all()
    assert ring[3].eq(20).all()


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
    assert spec.conv_tail_bytes == (6 * (width - 1) * 2 if width else 0)
    assert spec.kv_bytes_per_token == 8
