"""Whether grammars that clients wrote can be used, asked of a process that may die of them.

Knows nothing of what grammars say. The process starts with the first grammar, is killed when one
takes too long, and is started again for the next.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING

from .wire import frame, read_frame

if TYPE_CHECKING:
    from .messages import Grammar

MAX_KNOWN = 256
"""Answers kept."""
START_SECONDS = 10.0
"""For the process to be there; a busy machine starts one slowly."""


class GrammarChecker:
    """Asks about one grammar at a time. Lives on one event loop."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: time for one grammar to compile."""
        self._seconds = seconds
        self._known: OrderedDict[Grammar, str] = OrderedDict()
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, grammar: Grammar) -> None:
        """Raises ValueError, worded `grammar: what is wrong`, if it cannot be used; RuntimeError
        if nobody can say."""
        if grammar not in self._known:
            async with self._turn:
                if grammar not in self._known:  # whoever had the turn may have asked the same
                    self._known[grammar] = await self._ask(grammar)
        self._known.move_to_end(grammar)
        problem = self._known[grammar]
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        if problem:
            raise ValueError(problem)

    async def close(self) -> None:
        """Ends the process."""
        async with self._turn:
            await self._end()

    async def _ask(self, grammar: Grammar) -> str:
        process = self._process
        try:
            if process is None:
                process = await self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(frame(grammar))
            async with asyncio.timeout(self._seconds):
                return (await read_frame(process.stdout)).decode()
        except TimeoutError:
            await self._end()
            return f"grammar: it did not compile in {self._seconds:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._end()
            return "grammar: it is too complex"
        except BaseException:  # whoever asked is gone; the answer would be taken for the next one's
            await self._end()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"{__package__}.grammar_check",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                await read_frame(self._process.stdout)
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            raise RuntimeError("the process that checks grammars did not start") from error
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
