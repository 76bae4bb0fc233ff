"""Makes the load: starts each session when the plan wants it and keeps every record.

The clock's zero is the start of the measured load. In an open loop a late server never delays the
schedule; in a closed loop a user's next request is intended the moment the last answer ended.
Knows nothing of figures or processes.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from time import perf_counter, process_time
from typing import TYPE_CHECKING, NamedTuple

from .arrivals import level_at
from .records import AuditSample

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from .arrivals import Stage
    from .client import Answer, Client
    from .plan import Conversation, Plan, Session
    from .records import RequestRecord

_PREFETCH, _PREFETCH_BYTES = 512, 1 << 23
"""Sessions, and bytes of their first requests, that are made ahead of time."""
_SPIN = 1.2e-3
"""Event-loop timers are good to a millisecond; the rest of a wait is spent asking the clock."""
_LAG_PERIOD = 0.02
_REFILL_PERIOD = 0.001
_STAGGER = 0.0005
"""Seconds between the first sends of a closed loop's users: nobody's users start in one instant,
and a client that had to serve them so would be late for most."""


class _Prepared(NamedTuple):
    """A session whose first request is ready to be written."""

    session: Session
    conversation: Conversation
    answer: Answer


class Generator:
    """The load of one worker process.

    Args:
        share: (this worker, workers): it runs the sessions i with i % workers == this worker.
        canary: the right answer to the plan's canary, if it has one.
    """

    def __init__(
        self,
        client: Client,
        plan: Plan,
        share: tuple[int, int] = (0, 1),
        canary: str | None = None,
    ) -> None:
        self.records: list[RequestRecord] = []
        self.abandoned_turns = 0
        """Turns never sent because an earlier one of their session failed."""
        self.in_flight = 0
        self.launched = 0
        self._client = client
        self._plan = plan
        self._load = plan.scenario.load
        self._worker, self._workers = share
        self._canary = canary
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = self._finishing = False
        self._audit = AuditSample()
        limit = self._load.max_in_flight
        mine = None if limit is None else max(_part(limit, self._worker, self._workers), 1)
        self._slots = asyncio.Semaphore(mine) if mine is not None else None
        self._ready: deque[_Prepared] = deque()
        self._ready_bytes = 0
        self._next = self._worker
        self._stages = plan.scenario.lasting()
        self._duration = sum(stage.duration for stage in self._stages)

    # sessions in order

    def prepare(self) -> None:
        """Makes the first sessions ahead of time."""
        while not self._is_ahead() and self._make_one():
            pass

    def _is_ahead(self) -> bool:
        return len(self._ready) >= _PREFETCH or self._ready_bytes >= _PREFETCH_BYTES

    def _make_one(self) -> bool:
        if self._plan.count is not None and self._next >= self._plan.count:
            return False
        made = self._prepared(self._plan.session(self._next))
        self._ready.append(made)
        self._ready_bytes += len(made.answer.request)
        self._next += self._workers
        return True

    def _prepared(self, session: Session) -> _Prepared:
        conversation = self._plan.conversation(session)
        return _Prepared(session, conversation, self._client.prepare(conversation.outgoing(0)))

    async def _refill(self) -> None:
        """Makes sessions one at a time between sends: users who all become free at once must not
        wait for each other's next prompt."""
        while True:
            if not self._is_ahead():
                self._make_one()
            await asyncio.sleep(_REFILL_PERIOD)

    def _take(self) -> _Prepared | None:
        if not self._ready and not self._make_one():
            return None
        taken = self._ready.popleft()
        self._ready_bytes -= len(taken.answer.request)
        return taken

    # time

    async def _sleep_until(self, moment: float) -> None:
        wait = moment - self._client.now()
        if wait > _SPIN:
            await asyncio.sleep(wait - _SPIN)
        begin = perf_counter()
        while self._client.now() < moment:
            await asyncio.sleep(0)
        self._audit.spin_seconds += perf_counter() - begin

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_PERIOD
            await asyncio.sleep(_LAG_PERIOD)
            self._audit.loop_lag.append(max(loop.time() - due, 0.0))

    # load

    async def connect(self) -> None:
        """Opens a closed loop's connections, so that its first requests measure the server."""
        if self._plan.offsets is None:
            users = _part(_most_users(self._stages), self._worker, self._workers)
            await self._client.pool.open(users)

    async def warm_up(self) -> None:
        """Sends the warm-up sessions under the load's own concurrency or rate; awaits them all."""
        load = self._load
        mine = range(self._worker, load.warmup, self._workers)
        if not mine:
            return
        self._client.origin = perf_counter()
        if self._plan.offsets is None:
            todo = deque(mine)
            users = max(1, round(max(stage.level for stage in self._stages)))
            users = max(_part(users, self._worker, self._workers), 1)

            async def user() -> None:
                while todo and not self._stopping:
                    session = self._prepared(self._plan.session(todo.popleft(), warmup=True))
                    await self._run_session(session, self._client.now())

            await asyncio.gather(*(user() for _ in range(users)))
        else:
            for index in mine:
                if self._stopping:
                    break
                due = _offset(self._plan, index)
                session = self._prepared(self._plan.session(index, warmup=True))
                await self._sleep_until(due)
                self._start(session, due)
            await self._join()
        await asyncio.sleep(0)  # the last records
        self.records.clear()
        self.abandoned_turns = 0

    async def run(self, origin: float) -> AuditSample:
        """Runs the measured load and awaits what it started.

        Args:
            origin: `perf_counter` of time 0.
        """
        self._client.origin = origin
        await self._sleep_until(0.0)
        parsed, cpu, begin = self._client.pool.clock.seconds, process_time(), perf_counter()
        self._audit.spin_seconds = 0.0
        helpers = [asyncio.create_task(work) for work in (self._watch_lag(), self._refill())]
        try:
            if self._plan.offsets is None:
                await self._closed_loop()
            else:
                await self._open_loop()
            await self._join()
            await asyncio.sleep(0)  # the last records
        finally:
            for helper in helpers:
                helper.cancel()
        audit = self._audit
        audit.cpu_seconds = max(process_time() - cpu - audit.spin_seconds, 0.0)
        audit.wall_seconds = perf_counter() - begin
        audit.parse_seconds = self._client.pool.clock.seconds - parsed
        return audit

    def stop(self) -> None:
        """Sends nothing more and gives up what is in flight (outcome `unfinished`)."""
        self._stopping = True

        def cancel() -> None:
            for task in self._tasks:
                task.cancel()

        # a user whose next request went out just now has yet to wait for its answer
        asyncio.get_running_loop().call_soon(cancel)

    def finish(self) -> None:
        """Sends nothing more and awaits what is in flight; later turns are not sent."""
        self._finishing = True

    @property
    def _ending(self) -> bool:
        return self._stopping or self._finishing

    async def _open_loop(self) -> None:
        offsets = self._plan.offsets
        assert offsets is not None
        while (taken := self._take()) is not None:
            due = float(offsets[taken.session.index])
            await self._sleep_until(due)
            if self._ending:
                break
            self._start(taken, due)

    def _start(self, session: _Prepared, due: float) -> None:
        """Writes the request before anything else is done for it."""
        if self._slots is None:
            self._launch(session.answer, due)
        self._spawn(self._run_session(session, due))

    async def _closed_loop(self) -> None:
        for number in range(self._worker, _most_users(self._stages), self._workers):
            self._spawn(self._user(number))
        await self._join()

    def _due(self, number: int, free: float) -> float | None:
        """When user `number`, free at `free`, asks again; None for never."""
        due = _next_active(self._stages, number, free)
        return due if due is not None and due < self._duration else None

    async def _user(self, number: int) -> None:
        ahead: list[_Prepared] = []

        def ask_again(free: float) -> None:
            """Sends the next request in the moment the last answer ends, before anything is made
            of that answer: what the client does between the two would count as the server's."""
            if self._ending or not self._ready or self._due(number, free) != free:
                return
            taken = self._ready.popleft()
            self._ready_bytes -= len(taken.answer.request)
            if len(taken.session.turns) == 1:
                taken.answer.on_end = ask_again
            self._launch(taken.answer, free)
            ahead.append(taken)

        due = self._due(number, number * _STAGGER)
        while due is not None:
            if due > self._client.now():
                await self._sleep_until(due)
            if self._ending or (taken := self._take()) is None:
                return
            free = await self._run_session(taken, due, ask_again)
            while ahead:
                taken = ahead.pop()
                free = await self._run_session(taken, taken.answer.intended, ask_again)
            due = self._due(number, free)

    async def _run_session(
        self,
        prepared: _Prepared,
        intended: float,
        on_end: Callable[[float], None] | None = None,
    ) -> float:
        """Runs all turns; returns when the last one ended.

        Args:
            on_end: called as soon as the last answer is complete.
        """
        session, conversation, answer = prepared
        free = intended
        for number, turn in enumerate(session.turns):
            if number:
                answer = self._client.prepare(conversation.outgoing(number))
                intended = free + turn.think
                await self._sleep_until(intended)
                if self._ending:
                    break
            if number + 1 == len(session.turns):
                answer.on_end = on_end
            await self._send(answer, intended)
            free = answer.free
            if self._ending:
                break
            if answer.failed or answer.sink is None:
                self.abandoned_turns += len(session.turns) - number - 1
                break
            if number + 1 < len(session.turns):
                conversation.answered(answer.sink)
        every = self._plan.scenario.canary.every
        if self._canary is not None and session.index >= 0 and (session.index + 1) % every == 0:
            self._spawn(self._run_canary(session.index))
        return free

    def _turn_to(self, answer: Answer, intended: float) -> None:
        self.launched += 1
        self.in_flight += 1
        self._client.turn_to(answer, intended)

    def _launch(self, answer: Answer, intended: float) -> None:
        self._turn_to(answer, intended)
        self._client.launch(answer)

    async def _send(self, answer: Answer, intended: float) -> None:
        """Awaits the answer to a request, which may be on its way already."""
        if answer.dispatched is None:
            self._turn_to(answer, intended)
        try:
            if self._slots is None:
                await self._client.follow(answer)
            else:
                async with self._slots:
                    await self._client.follow(answer)
        finally:
            self.in_flight -= 1
        self._keep(answer)

    def _keep(self, answer: Answer) -> None:
        """Writes the record down when whoever waits for the answer has gone on."""
        asyncio.get_running_loop().call_soon(lambda: self.records.append(answer.record()))

    async def _run_canary(self, index: int) -> None:
        canary = self._plan.canary(index, self._canary)
        self._keep(await self._client.send(canary, self._client.now()))

    def _spawn(self, work: Coroutine[None, None, object]) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self) -> None:
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks)
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error


def _most_users(stages: list[Stage]) -> int:
    return math.ceil(max(max(stage.level, stage.end_level) for stage in stages))


def _part(whole: int, worker: int, workers: int) -> int:
    return whole // workers + (worker < whole % workers)


def _offset(plan: Plan, index: int) -> float:
    """Warm-up of an open loop repeats the spacing of its first arrivals."""
    assert plan.offsets is not None
    if not len(plan.offsets):
        return 0.0
    laps, place = divmod(index, len(plan.offsets))
    return float(plan.offsets[place] + laps * plan.offsets[-1])


def _next_active(stages: list[Stage], number: int, time: float) -> float | None:
    """When user `number`, free at `time`, is next wanted: the level must exceed the number."""
    begin = 0.0
    for stage in stages:
        end = begin + stage.duration
        if time < end:
            at = max(time, begin)
            if level_at(stages, at) > number:
                return at
            if stage.end_level > number:
                gain = (stage.end_level - stage.level) / stage.duration
                return max(at, begin + (number - stage.level) / gain + 1e-9)
        begin = end
    return None
