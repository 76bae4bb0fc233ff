"""Turns a scenario into sessions: who asks what, in how many turns, and when it starts.

Session i is made from (seed, i) alone, so any worker process can make its own share and a run of
the same seed asks the same things. Knows nothing of sending.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from .arrivals import schedule
from .client import Outgoing
from .lengths import Length
from .prompts import prompt_body
from .scenario import OPEN_LOOP
from .traces import MOONCAKE_BLOCK, TraceRow, read_trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .prompts import PromptPlan
    from .scenario import Scenario, Traffic
    from .stream import StreamSink

# first element after the seed in every random stream: what the stream is for
_SESSION, _WARMUP, _PREFIX, _BLOCK, _ARRIVALS = range(5)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a session, before its history is known."""

    prompt: list[int] | str
    max_tokens: int
    think: float = 0.0
    cancel_after: int | None = None
    read_rate: float | None = None


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Turns of one user who keeps the conversation's history."""

    index: int
    """Negative for warm-up."""
    traffic: Traffic
    prefix: list[int] | str
    turns: list[Turn]


class Plan:
    """All sessions of a run."""

    def __init__(self, scenario: Scenario, prompts: PromptPlan, model: str) -> None:
        self.scenario = scenario
        self._prompts = prompts
        self._model = model
        self._lengths = {
            (item.name, field): Length.parse(getattr(item, field), field)
            for item in scenario.traffic
            for field in ("prompt_tokens", "output_tokens", "turns", "think_time", "cancel_after")
        }
        weights = np.array([item.weight for item in scenario.traffic])
        self._shares = weights / weights.sum()
        load = scenario.load
        self._rows: list[TraceRow] = []
        if load.trace is not None:
            self._rows = read_trace(Path(load.trace), load.max_requests)
        self.offsets: NDArray[np.float64] | None = self._arrivals()
        """Open loop: when each session starts, in seconds; None for a closed loop."""
        self.count: int | None = (
            len(self.offsets) if self.offsets is not None else load.max_requests
        )
        """Sessions in all; None if only time ends them."""

    def _arrivals(self) -> NDArray[np.float64] | None:
        load = self.scenario.load
        if load.strategy not in OPEN_LOOP:
            return None
        if load.strategy == "throughput":
            return np.zeros(load.max_requests or 0)
        if load.strategy == "trace":
            times = np.array([row.time for row in self._rows]) / load.speed
            return times if load.max_duration is None else times[times < load.max_duration]
        times = schedule(
            load.strategy,  # pyright: ignore[reportArgumentType] the rest was handled above
            self.scenario.lasting(),
            self._generator(_ARRIVALS, 0),
            burstiness=load.burstiness,
            max_requests=load.max_requests,
        )
        return times if load.max_duration is None else times[times < load.max_duration]

    def _generator(self, purpose: int, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.scenario.seed, purpose, *key))

    def _piece(self, generator: np.random.Generator, tokens: float) -> list[int] | str:
        if self._prompts.kind == "ids":
            return self._prompts.tokens(generator, max(round(tokens), 1))
        return self._prompts.text(generator, tokens)

    def session(self, index: int, *, warmup: bool = False) -> Session:
        """Session `index` of the measured load, or of the warm-up."""
        generator = self._generator(_WARMUP if warmup else _SESSION, index)
        traffic = self.scenario.traffic[int(generator.choice(len(self._shares), p=self._shares))]
        turns = self._lengths[traffic.name, "turns"].draw_count(generator)
        row = self._rows[index % len(self._rows)] if self._rows else None
        return Session(
            index=-1 - index if warmup else index,
            traffic=traffic,
            prefix=self._prefix(traffic, generator),
            turns=[self._turn(traffic, generator, number, row) for number in range(turns)],
        )

    def _turn(
        self, traffic: Traffic, generator: np.random.Generator, number: int, row: TraceRow | None
    ) -> Turn:
        def draw(field: str) -> int:
            return self._lengths[traffic.name, field].draw_count(generator)

        first = row if number == 0 else None
        prompt_tokens = first.prompt_tokens if first else draw("prompt_tokens")
        if first is not None and first.blocks:
            prompt = self._from_blocks(first)
        else:
            overhead = self._prompts.overhead if number == 0 else 0.0
            prompt = self._piece(generator, max(prompt_tokens - overhead, 1))
        cancelled = generator.random() < traffic.cancel_share
        slow = generator.random() < traffic.slow_share
        think = self._lengths[traffic.name, "think_time"].draw(generator) if number else 0.0
        return Turn(
            prompt=prompt,
            max_tokens=first.output_tokens if first else draw("output_tokens"),
            think=think,
            cancel_after=draw("cancel_after") if cancelled else None,
            read_rate=traffic.slow_rate if slow else None,
        )

    def _from_blocks(self, row: TraceRow) -> list[int] | str:
        """Prompts that name the same block share its text."""
        sizes = np.full(len(row.blocks), MOONCAKE_BLOCK)
        sizes[-1] = max(row.prompt_tokens - MOONCAKE_BLOCK * (len(row.blocks) - 1), 1)
        pieces = [
            self._piece(self._generator(_BLOCK, block), MOONCAKE_BLOCK) for block in row.blocks
        ]
        if self._prompts.kind == "ids":
            return [
                token
                for piece, size in zip(pieces, sizes.tolist(), strict=True)
                for token in piece[:size]
                if isinstance(token, int)
            ]
        last = self._piece(self._generator(_BLOCK, row.blocks[-1]), int(sizes[-1]))
        return " ".join(str(piece) for piece in (*pieces[:-1], last))

    def _prefix(self, traffic: Traffic, generator: np.random.Generator) -> list[int] | str:
        """A path from the root of the traffic's prefix tree; nodes are shared by all sessions."""
        ids: list[int] = []
        texts: list[str] = []
        name = int.from_bytes(traffic.name.encode()[:6], "little")
        path: tuple[int, ...] = ()
        for level in traffic.prefix_tree:
            weights = 1.0 / np.arange(1, level.fanout + 1) ** traffic.prefix_skew
            path = (*path, int(generator.choice(level.fanout, p=weights / weights.sum())))
            piece = self._piece(self._generator(_PREFIX, name, *path), level.tokens)
            if isinstance(piece, str):
                texts.append(piece)
            else:
                ids += piece
        return ids if self._prompts.kind == "ids" else " ".join(texts)

    def canary(self, index: int, expected: str | None) -> Outgoing:
        """The canary request; without an expectation its answer is only read."""
        canary, shape = self.scenario.canary, self.scenario.request
        return Outgoing(
            index=index,
            traffic="canary",
            endpoint=shape.endpoint,
            body={
                "model": self._model,
                "temperature": 0,
                **prompt_body(shape.endpoint, canary.prompt),
            },
            max_tokens=canary.max_tokens,
            keep_output=True,
            expected=expected,
        )

    def conversation(self, session: Session) -> Conversation:
        return Conversation(session, self.scenario, self._model)


class Conversation:
    """The growing prompt of one session."""

    def __init__(self, session: Session, scenario: Scenario, model: str) -> None:
        self._session = session
        self._shape = scenario.request
        self._base: dict[str, Any] = {
            "model": model,
            "temperature": self._shape.temperature,
            **({"ignore_eos": True} if self._shape.ignore_eos else {}),
            **session.traffic.extra,
        }
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._text = ""
        prefix = session.prefix
        if isinstance(prefix, list):
            self._ids = list(prefix)
        elif prefix:
            self._messages.append({"role": "system", "content": prefix})
            self._text = prefix + " "

    def outgoing(self, number: int) -> Outgoing:
        """The request of turn `number`; turns before it must have been answered."""
        turn = self._session.turns[number]
        body = dict(self._base)
        if self._shape.endpoint == "chat":
            self._messages.append({"role": "user", "content": str(turn.prompt)})
            body["messages"] = list(self._messages)
        elif isinstance(turn.prompt, list):
            self._ids += turn.prompt
            body["prompt"] = list(self._ids)
        else:
            self._text += turn.prompt
            body["prompt"] = self._text
        return Outgoing(
            index=self._session.index,
            turn=number,
            traffic=self._session.traffic.name,
            endpoint=self._shape.endpoint,
            body=body,
            max_tokens=turn.max_tokens,
            cancel_after=turn.cancel_after,
            read_rate=turn.read_rate,
            keep_output=number + 1 < len(self._session.turns),
        )

    def answered(self, sink: StreamSink) -> None:
        """Takes the answer into the history (by ids where the server sent them)."""
        text = "".join(sink.text)
        self._messages.append({"role": "assistant", "content": text})
        self._ids += sink.token_ids
        self._text += text + " "
