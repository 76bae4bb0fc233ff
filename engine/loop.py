"""The loop around the step: take commands in, step while there is work, send reports out.

Knows nothing of sockets or threads: whoever runs it gives it an inbox and a way to send.
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING

from .messages import (
    AbortRequest,
    EngineCommand,
    EngineInfo,
    EngineReply,
    GenerateRequest,
    Heartbeat,
    ResetPrefixCache,
    Shutdown,
    StepReport,
    TokenEvent,
)
from .sampling_checks import check_sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core import EngineCore

HEARTBEAT_SECONDS = 1.0


def run_loop(
    core: EngineCore,
    info: EngineInfo,
    inbox: queue.SimpleQueue[EngineCommand],
    send: Callable[[EngineReply], None],
) -> None:
    """Serves commands until `Shutdown`. Errors of a step are the caller's: the engine is broken."""
    while True:
        events: list[TokenEvent] = []
        for command in _commands(inbox, wait=not core.has_work):
            match command:
                case GenerateRequest():
                    problem = refuse(command, info)
                    if problem is None:
                        core.add(command)
                    else:
                        events += _refusals(command, problem)
                case AbortRequest():
                    core.abort(command.request_id, command.index)
                case ResetPrefixCache():
                    core.reset_prefixes()
                case Shutdown():
                    return
        if core.has_work:
            events += core.step()
            send(StepReport(tuple(events), core.stats()))
        elif events:
            send(StepReport(tuple(events), core.stats()))
        else:
            send(Heartbeat(core.stats()))


def refuse(request: GenerateRequest, info: EngineInfo) -> str | None:
    """Why the engine cannot run a request, or None. The server checks too; this is the last."""
    length = len(request.prompt)
    if not 0 < length < info.max_model_len:
        return f"prompt: {length} tokens, must be in 1..{info.max_model_len - 1}"
    if min(request.prompt) < 0 or max(request.prompt) >= info.vocab_size:
        return f"prompt: a token id is outside 0..{info.vocab_size - 1}"
    try:
        check_sampling(request.params, info.vocab_size, info.eos_token_ids)
    except ValueError as error:
        return str(error)
    return None


def _refusals(request: GenerateRequest, problem: str) -> list[TokenEvent]:
    return [
        TokenEvent(request.request_id, index, finish_reason="error", error=problem)
        for index in range(max(request.params.n, 1))
    ]


def _commands(inbox: queue.SimpleQueue[EngineCommand], wait: bool) -> list[EngineCommand]:
    """Everything in the inbox; if `wait`, the first for at most a heartbeat."""
    commands: list[EngineCommand] = []
    try:
        if wait:
            commands.append(inbox.get(timeout=HEARTBEAT_SECONDS))
        while True:
            commands.append(inbox.get_nowait())
    except queue.Empty:
        return commands
