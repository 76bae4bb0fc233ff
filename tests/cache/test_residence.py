"""How long cached prefixes stay is told as it was: who sizes the page pool by these figures would
otherwise buy memory that nobody uses, or go without what every second prompt needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from convserve.cache import CacheManager, CacheSizes
from convserve.cache.pools import SequenceId
from convserve.cache.residence import PAGE_TIME_EDGES, Times

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = 4
PROMPT = list(range(3 * PAGE + 1))


class Books:
    """A cache of four pages whose clock the test turns."""

    def __init__(self, window: int | None = None) -> None:
        self.now = 100.0
        self.cache = CacheManager(
            CacheSizes(num_pages=4, page_size=PAGE, num_slots=2, ring_len=4),
            window=window,
            clock=lambda: self.now,
        )
        self.residence = self.cache.residence
        self.ids = 0

    def admit(self, tokens: Sequence[int], salt: str = "") -> SequenceId:
        self.ids += 1
        seq = SequenceId(self.ids)
        assert self.cache.admit(seq, tokens, salt=salt) is not None
        return seq

    def run(self, tokens: Sequence[int], seconds: float, salt: str = "") -> None:
        """A request from admission to release; its pages are full at once."""
        seq = self.admit(tokens, salt)
        self.cache.commit(seq, tokens, len(tokens))
        self.now += seconds
        self.cache.release(seq)


def found(times: Times) -> dict[float, int]:
    """Counts by the upper edge of their bin."""
    edges = (*PAGE_TIME_EDGES, float("inf"))
    return {edge: n for edge, n in zip(edges, times.counts, strict=True) if n}


def test_a_page_lives_from_full_to_evicted_and_idles_from_its_last_use() -> None:
    books = Books()
    books.run(PROMPT, seconds=3)
    books.now += 40
    assert not any(books.residence.lifetimes.counts)
    books.run(PROMPT, seconds=1, salt="another tenant's: nothing is shared, and all must go")
    assert found(books.residence.lifetimes) == {60.0: 3}
    assert books.residence.lifetimes.seconds == pytest.approx(3 * 43)
    assert found(books.residence.idle_times) == {60.0: 3}
    assert books.residence.idle_times.seconds == pytest.approx(3 * 40)
    assert not any(books.residence.reuse_gaps.counts)


def test_a_page_that_is_shared_again_was_idle_for_a_gap() -> None:
    books = Books()
    books.run(PROMPT, seconds=3)
    books.now += 0.4
    books.run(PROMPT[: PAGE + 1], seconds=1)
    books.run(PROMPT, seconds=2)
    # one page after 0.4 s, then the same at once; the others after 0.4 + 1 s
    assert found(books.residence.reuse_gaps) == {0.5: 1, 0.001: 1, 2.0: 2}
    assert books.residence.reuse_gaps.seconds == pytest.approx(0.4 + 2 * 1.4)
    books.run(PROMPT, seconds=0, salt="x")
    assert books.residence.idle_times.counts[0] == 3


def test_an_admission_that_is_refused_used_nothing() -> None:
    books = Books()
    books.run(PROMPT, seconds=1)
    other = books.admit([9, 9], salt="x")
    assert books.cache.admit(SequenceId(99), list(range(17))) is None
    assert not any(books.residence.reuse_gaps.counts)
    books.cache.release(other)


def test_pages_behind_a_window_are_given_up_when_they_are_passed() -> None:
    books = Books(window=2)
    seq = books.admit(PROMPT)
    books.cache.commit(seq, PROMPT, len(PROMPT))
    books.now += 5
    assert books.cache.extend(seq, len(PROMPT) + 1)
    books.now += 20
    books.cache.release(seq)
    books.run([7] * (3 * PAGE), seconds=0)
    assert set(found(books.residence.idle_times)) == {20.0}
    assert set(found(books.residence.lifetimes)) == {30.0}


def test_forgotten_prefixes_are_not_evicted() -> None:
    books = Books()
    books.run(PROMPT, seconds=1)
    books.cache.reset_prefixes()
    books.run(PROMPT, seconds=1, salt="x")
    assert not any(books.residence.lifetimes.counts)
