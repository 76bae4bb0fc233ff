"""What the cache room's door does in single cases: which prefixes are shared, where their windows
come from, what is evicted first, and that misuse is caught."""

from __future__ import annotations

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
    StateSpec,
)
from convserve.cache.pools import PageId, PagePool, SequenceId, SlotId, SlotPool, TailId
from convserve.cache.prefix import PrefixIndex

SIZES = CacheSizes(num_pages=12, page_size=4, num_slots=5, ring_len=4, num_tails=3)
REPLAY = 6
SPEC = StateSpec((LayerSpec(AttentionSpec(1, 1), {"qkv": ConvSpec(1, 4)}),), torch.float64, REPLAY)
CPU = torch.device("cpu")


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


def test_a_match_is_believed_only_if_its_tokens_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if every key were the same: a collision must not hand out another prompt's state."""
    cache = CacheManager(SIZES, replay_length=0)
    monkeypatch.setattr(PrefixIndex, "key", lambda *_: b"same")
    run(cache, 1, [1] * 9)
    assert run(cache, 2, [2] * 9) == (0, 0)
    assert run(cache, 3, [1] * 9, salt="other") == (0, 0)
    assert run(cache, 4, [1] * 9) == (4, 4)  # the second page follows another


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
