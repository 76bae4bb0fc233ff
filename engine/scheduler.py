"""Who advances by how many tokens: the queues, admission, preemption, and the end of sequences.

There is no prefill phase and no decode phase. Every sequence has `tokens` and `num_computed`, and
each step it advances by some of the tokens in between: one when it is generating, a chunk when its
prompt (or what a preemption took) is still to be computed. `plan` decides, reserves and counts the
step as done, for whatever is launched later runs after it; `commit` takes its results in, which
may be after the next step was planned. Nothing here knows about tensors or text.
"""

from __future__ import annotations

import bisect
import itertools
import time
from typing import TYPE_CHECKING

import msgspec

from ..cache import Copies
from .messages import TokenEvent
from .plan import NOT_FINITE, Sampled, StepPlan, Work
from .sequence import Sequence, Status, new_sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..cache import CacheManager
    from .messages import FinishReason, GenerateRequest, Logprobs

RUNNING, FINISHED = Status.RUNNING, Status.FINISHED
"""Looked up once: a member of an enumeration is a slow attribute, and plans ask for every row."""

MAX_SCORED_ROWS = 256
"""Rows with logits for every one of them are many numbers: a scored chunk is at most this long."""

WATERMARK = 0.01
"""Share of the pages kept free at admission, so that running sequences can grow."""


class Scheduler:
    """Queues of sequences over a cache manager."""

    def __init__(
        self,
        cache: CacheManager,
        max_batch_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        assert max_model_len <= cache.sizes.capacity, "a sequence alone must fit in the pool"
        self._cache = cache
        self._page_size = cache.sizes.page_size
        self._max_batch_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._waiting: list[Sequence] = []  # ascending rank
        self._running: list[Sequence] = []  # ascending rank
        self._live: dict[str, list[Sequence]] = {}
        self._ids = itertools.count(1)
        self.num_preemptions = 0
        self.num_corrupted = 0
        """Sequences that ended because their logits were not finite."""
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_queried_tokens = 0
        """Prompt tokens looked up in the prefix cache."""
        self.num_hit_tokens = 0
        """Prompt tokens found there."""
        self.num_replayed_tokens = 0
        """Tokens found there whose conv windows were rebuilt by running them again."""

    @property
    def num_waiting(self) -> int:
        """Sequences waiting, those that will fork from another included."""
        return len(self._waiting) + sum(len(s.forks) for s in (*self._waiting, *self._running))

    @property
    def num_running(self) -> int:
        """Sequences that own state."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """A sequence is running or waiting."""
        return bool(self._running or self._waiting)

    def add(self, request: GenerateRequest) -> None:
        """Queues a request: its first choice, with the others waiting to fork from it."""
        assert request.request_id not in self._live, f"request {request.request_id} is live"
        assert 0 < len(request.prompt) < self._max_model_len, "prompt length unchecked"
        choices = [
            new_sequence(request, i, next(self._ids), self._max_model_len, self._eos)
            for i in range(request.params.n)
        ]
        choices[0].forks = choices[1:]
        if request.params.prompt_logprobs is not None:
            choices[0].prompt_logprobs = [None]
        self._live[request.request_id] = choices
        self._enqueue(choices[0])
        self.num_prompt_tokens += len(request.prompt)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one choice of it, at once; ends of unknown ones are no news."""
        for seq in list(self._live.get(request_id, ())):
            if index is None or seq.index == index:
                self._end(seq, "abort")

    def abort_all(self) -> list[str]:
        """Ends everything; the ids of the requests that were live."""
        ids = list(self._live)
        for request_id in ids:
            self.abort(request_id)
        return ids

    def plan(self) -> StepPlan:
        """Decides the next step and reserves its pages. Empty if nothing can advance.

        Running sequences go first, those about to generate before those with chunks to compute, so
        that a long prompt never stalls a stream; then waiting ones in order while they fit.
        """
        budget, size = self._max_batch_tokens, self._page_size
        works: list[Work] = []
        unsettled: list[int] = []
        preemptions_before = self.num_preemptions
        chunked: list[Sequence] = []
        for seq in tuple(self._running):
            if budget == 0:
                break
            start, known = seq.num_computed, len(seq.tokens)
            length = known + seq.num_in_flight
            if length >= seq.max_len or seq.status is not RUNNING:
                continue  # about to end, or preempted for one before it
            if length - start > 1 or (seq.prompt_logprobs is not None and seq.num_to_score):
                chunked.append(seq)
                continue
            if start >= known and 0 < start % size < size - 1:
                # Generating inside a page that it writes already: nothing to ask, nothing to tell.
                works.append(Work(seq, start, 1, True, True))
                seq.num_computed = start + 1
                seq.num_in_flight += 1
            elif start % size or self._make_room(seq, length, works):
                unsettled.append(len(works))
                works.append(Work(seq, start, 1, True, start >= known))
            else:
                continue
            budget -= 1
        for seq in chunked:
            if budget == 0:
                break
            if seq.status is not RUNNING:
                continue
            work = self._work(seq, budget)
            if self._make_room(seq, work.stop, works):
                unsettled.append(len(works))
                works.append(work)
                budget -= work.rows
        while self._waiting and budget and self.num_preemptions == preemptions_before:
            seq = self._waiting[0]
            if not self._admit(seq):
                break
            self._start(self._waiting.pop(0))
            work = self._work(seq, budget)
            unsettled.append(len(works))
            works.append(work)
            budget -= work.rows
        for i in unsettled:
            work = works[i]
            if work.rows > 1 or work.start % size == 0:
                # A replay's rows write nothing.
                first_own = max(work.start, self._cache.shared(work.seq.id))
                self._cache.check_writable(work.seq.id, first_own, work.stop)
        # Without works nothing runs, and what is to be copied stays as it is until something does.
        copies = self._cache.take_copies() if works else Copies()
        for i in unsettled:
            self._advance(works[i])
        return StepPlan(tuple(works), copies, self._max_batch_tokens - budget, tuple(unsettled))

    def commit(self, plan: StepPlan, sampled: list[Sampled]) -> list[TokenEvent]:
        """Takes a step's results in: appends, finishes. Returns what to report.

        A sequence that ended or was preempted while the step ran keeps the token (it is the one
        that its prefix calls for) but has no state to commit.
        """
        events: list[TokenEvent] = []
        num_failed = 0
        for i in plan.unsettled:
            self._settle(plan.works[i], sampled[i])
        for work, result in zip(plan.works, sampled, strict=True):
            seq, token = work.seq, result.token_id
            if seq.status is FINISHED:
                continue
            if work.samples:
                seq.num_in_flight -= 1
            if token is None:
                if result.problem is not None:
                    events.append(self._failure(seq, result.problem))
                    num_failed += 1
                continue
            tokens = seq.tokens
            tokens.append(token)
            logprobs = () if result.logprobs is None else (result.logprobs,)
            if seq.has_reported and token not in seq.ends and len(tokens) < seq.max_len:
                events.append(TokenEvent(seq.request_id, seq.index, (token,), logprobs))
            else:
                events.append(self._first_or_last(seq, token, logprobs))
        self.num_generated_tokens += len(events) - num_failed
        return events

    def _settle(self, work: Work, result: Sampled) -> None:
        """Takes in what a step has done beside choosing a token."""
        seq = work.seq
        if seq.status is FINISHED:
            return
        if work.is_fed and work.stop % self._page_size == 0 and seq.status is RUNNING:
            self._cache.commit(seq.id, seq.tokens, work.stop, seq.num_computed - work.stop)
        if seq.prompt_logprobs is not None:
            seq.prompt_logprobs += result.scored

    def _advance(self, work: Work) -> None:
        """Counts a planned work as done."""
        seq, stop = work.seq, work.start + work.rows
        seq.num_computed = stop
        if work.samples:
            seq.num_in_flight += 1
        if work.is_fed:
            if stop % self._page_size == 0:
                self._cache.foresee(seq.id, stop)
        elif work.rows > 1 or stop % self._page_size == 0 or seq.forks:
            self._cache.commit(seq.id, seq.tokens, stop)
        if seq.forks and stop >= seq.prompt_len - 1:
            self._fork(seq)

    def _enqueue(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        bisect.insort(self._waiting, seq, key=lambda s: s.rank)

    def _admit(self, seq: Sequence) -> bool:
        """Gives a waiting sequence state, from its cached prefix on, if there is room."""
        reserve = int(self._cache.sizes.num_pages * WATERMARK) if self._running else 0
        admission = self._cache.admit(
            seq.id,
            seq.tokens,
            salt=seq.salt,
            reserve=reserve,
            share=not seq.num_to_score,  # rows that are not computed cannot be scored
        )
        if admission is None:
            return False
        seq.num_computed = admission.start
        self.num_replayed_tokens += admission.num_replayed
        if seq.first_scheduled_at is None:  # what a preemption takes is no query
            seq.num_cached = min(admission.num_cached, seq.prompt_len)
            self.num_queried_tokens += seq.prompt_len
            self.num_hit_tokens += seq.num_cached
        return True

    def _start(self, seq: Sequence) -> None:
        seq.status = Status.RUNNING
        bisect.insort(self._running, seq, key=lambda s: s.rank)
        if seq.first_scheduled_at is None:
            seq.first_scheduled_at = time.monotonic()

    def _work(self, seq: Sequence, budget: int) -> Work:
        rows = min(seq.num_pending, budget)
        if rows < seq.num_pending:
            rows = self._aligned(seq.num_computed, rows)
        cut = self._cache.cut(seq.id)
        if cut is not None and seq.num_computed < cut:
            rows = min(rows, cut - seq.num_computed)
        if seq.forks and seq.num_computed < seq.prompt_len - 1:
            # Recurrent state cannot go back: the others start before the last prompt token.
            rows = min(rows, seq.prompt_len - 1 - seq.num_computed)
        to_score = seq.num_to_score
        if to_score:
            rows = min(rows, MAX_SCORED_ROWS)
        # Rows scored before a preemption are computed again but not scored again.
        skip = max(0, seq.prompt_len - 1 - to_score - seq.num_computed) if to_score else 0
        return Work(
            seq,
            start=seq.num_computed,
            rows=rows,
            samples=rows == seq.num_pending,
            is_fed=seq.num_computed + rows > len(seq.tokens),
            score_from=skip,
            score_rows=max(0, min(rows - skip, to_score)),
        )

    def _aligned(self, start: int, rows: int) -> int:
        """Fewer rows, so that a chunk ends where a page does and its conv windows can be stored."""
        stop = start + rows
        return rows - min(stop % self._cache.sizes.page_size, rows - 1)

    def _make_room(self, seq: Sequence, num_tokens: int, works: list[Work]) -> bool:
        """Extends the sequence's pages, preempting the last in rank until it fits."""
        while not self._cache.extend(seq.id, num_tokens):
            planned = {work.seq.id for work in works}  # they stay: the step counts on them
            candidates = [s for s in self._running if s.id not in planned]
            victim = max(candidates, key=lambda s: s.rank)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Gives the sequence's state back; it will be computed again from its tokens."""
        self._cache.release(seq.id)
        self._running.remove(seq)
        seq.num_computed = 0
        self._enqueue(seq)
        self.num_preemptions += 1

    def _fork(self, leader: Sequence) -> None:
        """Starts the leader's other choices from the state before the last prompt token.

        They compute that token again, each in a page of its own, and so come to sample for
        themselves. Those that do not fit now compute the prompt by themselves later.
        """
        forks, leader.forks = leader.forks, []
        for seq in forks:
            if self._cache.fork(leader.id, seq.id, leader.prompt_len - 1):
                seq.num_computed = leader.prompt_len - 1
                seq.num_cached = leader.num_cached
                self._start(seq)
            else:
                self._enqueue(seq)

    def _first_or_last(
        self, seq: Sequence, token: int, logprobs: tuple[Logprobs, ...]
    ) -> TokenEvent:
        """The event of a token that is the sequence's first, or its last, which ends it."""
        finish: FinishReason | None = None
        stop_token = None
        if token in seq.ends:
            finish = "stop"
            stop_token = token if token in seq.params.stop_token_ids else None
        elif len(seq.tokens) >= seq.max_len:
            finish = "length"
        event = TokenEvent(seq.request_id, seq.index, (token,), logprobs, finish, stop_token)
        if not seq.has_reported:
            event = self._first(seq, event)
        if finish is not None:
            self._end(seq, finish)
        return event

    def _first(self, seq: Sequence, event: TokenEvent) -> TokenEvent:
        """The event, with what is told once."""
        seq.has_reported = True
        now, started = time.monotonic(), seq.first_scheduled_at
        assert started is not None
        return msgspec.structs.replace(
            event,
            prompt_logprobs=None if seq.prompt_logprobs is None else tuple(seq.prompt_logprobs),
            num_cached_tokens=seq.num_cached,
            queue_seconds=started - seq.arrived_at,
            prefill_seconds=now - started,
        )

    def _failure(self, seq: Sequence, problem: str) -> TokenEvent:
        self.num_corrupted += problem == NOT_FINITE
        self._end(seq, "error")
        return TokenEvent(
            seq.request_id,
            seq.index,
            finish_reason="error",
            error=problem,
        )

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """Finishes a sequence wherever it stands and frees what it owns."""
        if seq.status is Status.RUNNING:
            self._running.remove(seq)
        elif seq in self._waiting:
            self._waiting.remove(seq)
        forks, seq.forks = seq.forks, []
        for other in forks:  # they lose the prompt they would have shared
            self._enqueue(other)
        for other in self._live[seq.request_id]:
            if seq in other.forks:
                other.forks.remove(seq)
        self._cache.release(seq.id)
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        siblings = self._live[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._live[seq.request_id]
